"""What a model itself is asked for: labels, judgements, plans, chains of thought."""

from __future__ import annotations

from tests.structured.builders import (
    BOOLEAN,
    NUMBER,
    TEXT,
    Schema,
    choice,
    integer,
    listed,
    maybe,
    number,
    record,
    ref,
    text,
)

_SHARE = number(minimum=0, maximum=1)
_SPAN = record({"text": TEXT, "start": integer(minimum=0), "end": integer(minimum=0)})

ANSWERS: dict[str, Schema] = {
    "label": {"enum": ["positive", "neutral", "negative"]},
    "label in an object": record({"sentiment": choice("positive", "neutral", "negative")}),
    "label and confidence": record({"label": choice("spam", "ham"), "confidence": _SHARE}),
    "yes or no": BOOLEAN,
    "mark": integer(minimum=1, maximum=10),
    "many labels": record(
        {"topics": listed(choice("sport", "politics", "science", "arts", "local"), maxItems=5)}
    ),
    "scores by label": record(dict.fromkeys(("joy", "anger", "fear", "disgust"), _SHARE)),
    "moderation": record(
        {
            "flagged": BOOLEAN,
            "categories": record(
                dict.fromkeys(("hate", "violence", "self-harm", "sexual"), BOOLEAN)
            ),
            "category_scores": {"type": "object", "additionalProperties": _SHARE},
        }
    ),
    "ticket routing": record(
        {
            "team": choice("billing", "shipping", "technical", "sales"),
            "urgency": integer(minimum=1, maximum=5),
            "language": text(pattern="^[a-z]{2}$"),
            "reply_draft": text(maxLength=600),
        }
    ),
    "intent and slots": {
        "anyOf": [
            record({"intent": {"const": "greet"}}),
            record({"intent": {"const": "play"}, "artist": maybe(TEXT), "track": maybe(TEXT)}),
            record({"intent": {"const": "timer"}, "seconds": integer(minimum=1)}),
            record({"intent": {"const": "lights"}, "room": TEXT, "on": BOOLEAN}),
        ]
    },
    "reasoning then answer": record(
        {
            "steps": listed(record({"explanation": TEXT, "output": TEXT}), minItems=1, maxItems=6),
            "final_answer": TEXT,
        }
    ),
    "thought, action, input": record(
        {
            "thought": text(minLength=1, maxLength=300),
            "action": choice("search", "calculate", "finish"),
            "action_input": TEXT,
        }
    ),
    "arithmetic": record(
        {
            "equation": text(pattern=r"^[0-9]+( [-+*/] [0-9]+)+$"),
            "result": NUMBER,
            "is_exact": BOOLEAN,
        }
    ),
    "multiple choice": record(
        {
            "eliminated": listed(choice("A", "B", "C", "D"), maxItems=3),
            "answer": choice("A", "B", "C", "D"),
        }
    ),
    "named entities": listed(
        record({"entity": TEXT, "kind": choice("PER", "ORG", "LOC", "MISC"), "span": _SPAN})
    ),
    "relations": record(
        {
            "entities": listed(record({"id": integer(minimum=0), "name": TEXT})),
            "triples": listed(
                {
                    "type": "array",
                    "prefixItems": [integer(minimum=0), TEXT, integer(minimum=0)],
                    "items": False,
                    "minItems": 3,
                }
            ),
        }
    ),
    "summary": record(
        {
            "headline": text(minLength=10, maxLength=80),
            "bullets": listed(text(minLength=1, maxLength=160), minItems=3, maxItems=3),
            "quote": maybe(TEXT),
        }
    ),
    "answer with sources": record(
        {
            "answer": TEXT,
            "citations": listed(record({"doc": integer(minimum=1), "quote": text(maxLength=200)})),
            "answerable": BOOLEAN,
        }
    ),
    "comparison of two": record(
        {
            "reasons": listed(TEXT, minItems=1, maxItems=3),
            "winner": choice("first", "second", "tie"),
        }
    ),
    "rubric": record(
        {
            name: record({"why": TEXT, "points": integer(minimum=0, maximum=4)})
            for name in ("clarity", "accuracy", "style")
        }
    ),
    "quiz": record(
        {
            "questions": listed(
                record(
                    {
                        "question": TEXT,
                        "options": listed(TEXT, minItems=4, maxItems=4),
                        "correct": integer(minimum=0, maximum=3),
                    }
                ),
                minItems=1,
                maxItems=3,
            )
        }
    ),
    "translation": record(
        {
            "source": text(pattern="^[a-z]{2,3}$"),
            "target": text(pattern="^[a-z]{2,3}$"),
            "text": TEXT,
        }
    ),
    "code review": record(
        {
            "verdict": choice("approve", "comment", "request changes"),
            "comments": listed(
                record(
                    {
                        "file": text(pattern=r"^[\w./-]+$"),
                        "line": integer(minimum=1),
                        "severity": choice("nit", "minor", "major"),
                        "suggestion": maybe(TEXT),
                    }
                )
            ),
        }
    ),
    "plan": record(
        {
            "goal": TEXT,
            "tasks": listed(
                record(
                    {
                        "id": integer(minimum=1),
                        "title": TEXT,
                        "after": listed(integer(minimum=1)),
                        "hours": number(minimum=0.25, multipleOf=0.25, maximum=80),
                    }
                ),
                minItems=1,
            ),
        }
    ),
    "hypotheses": record(
        {
            "hypotheses": listed(ref("hypothesis"), minItems=2, maxItems=4),
            "best": integer(minimum=0, maximum=3),
        },
        **{
            "$defs": {
                "hypothesis": record({"claim": TEXT, "for": listed(TEXT), "against": listed(TEXT)})
            }
        },
    ),
    "redaction": listed(
        {"anyOf": [record({"keep": TEXT}), record({"mask": choice("NAME", "DATE", "PLACE", "ID")})]}
    ),
    "search queries": listed(text(minLength=3, maxLength=60), minItems=1, maxItems=5),
    "table": record(
        {
            "columns": listed(TEXT, minItems=1, maxItems=6),
            "rows": listed(listed({"type": ["string", "number", "null"]}), maxItems=10),
        }
    ),
}
