"""The tools of a request: how its model is shown them, held to a call, and read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from llama_runtime.conversation import Conversation
from llama_runtime.errors import RequestError
from llama_runtime.params import SamplingParams
from llama_runtime.tool_calls import ParsedAnswer, parse_tool_calls
from llama_runtime.tool_grammar import rule_index, tool_grammar
from llama_runtime.tool_messages import normalise_tool_messages, with_tools_in_system
from llama_runtime.tools import Tool, ToolDialect, check_tool_choice, check_tools

_PLACE = re.compile(r"at (\d+)\(")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What one request says of tools, for one chat template.

    Attributes:
        tools: those that the model is shown; none under the choice "none".
        choice: "auto", "none", "required" or the one tool that is to be called, in OpenAI's form.
        dialect: the form in which the model writes calls.
        in_template: whether the template has a place for tools; else the system message has.
    """

    tools: tuple[Tool, ...]
    choice: object
    dialect: ToolDialect
    in_template: bool

    @classmethod
    def of(
        cls, tools: object, choice: object, dialect: ToolDialect, *, in_template: bool
    ) -> ToolUse:
        """Check what a caller gave.

        Args:
            tools: definitions in OpenAI's form, or None.
            choice: as above; None is "auto".
            dialect: as above.
            in_template: as above.

        Raises:
            RequestError: they are wrong, or the choice asks for what isn't there.
        """
        checked = () if tools is None else check_tools(tools)
        choice = "auto" if choice is None else choice
        check_tool_choice(choice, checked)
        return cls(() if choice == "none" else checked, choice, dialect, in_template)

    def conversation(self, messages: Sequence[Mapping[str, object]]) -> Conversation:
        """The messages, with calls and results as the template takes them, and the tools.

        Raises:
            RequestError: a message isn't well formed.
        """
        if not self.in_template:
            return Conversation(with_tools_in_system(messages, self.tools))
        shown = [dict(tool.definition) for tool in self.tools]
        return Conversation(normalise_tool_messages(messages), shown or None)

    def hold(self, params: SamplingParams) -> SamplingParams:
        """The same, held to a call where the choice asks for one.

        Raises:
            RequestError: the completion is held to something else already.
        """
        grammar = tool_grammar(self.tools, self.choice, self.dialect)
        if grammar is None:
            return params
        if params.constraint is not None:
            raise RequestError(
                f"{params.constraint.kind} can't be given beside a tool_choice that asks for a "
                "call, which holds the completion too",
                param=params.constraint.kind,
            )
        for name, is_set in (
            ("min_tokens", params.min_tokens > 0),
            ("ignore_eos", params.ignore_eos),
        ):
            if is_set:
                raise RequestError(
                    f"{name} can't be given beside a tool_choice that asks for a call, which says "
                    "where a completion ends",
                    param=name,
                )
        with self.blamed():
            return replace(params, grammar=grammar)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Let what is wrong with a grammar of calls be said of the tools that it was made from."""
        try:
            yield
        except RequestError as error:
            if error.param != "grammar" or self.choice in ("auto", "none"):
                raise
            raise RequestError(f"{self._culprit(error)}: {error}", param="tools") from error

    def _culprit(self, error: RequestError) -> str:
        """Which tool's rule it is, where the error names its place."""
        place = _PLACE.search(str(error))
        allowed = check_tool_choice(self.choice, self.tools)
        index = None if place is None else rule_index(int(place[1]))
        if index is None or index >= len(allowed):
            return "the parameters of the tools can't be enforced"
        return f"the parameters of the tool {allowed[index].name!r} can't be enforced"

    def read(self, text: str, *, is_whole: bool) -> ParsedAnswer:
        """Take an answer apart into what it says and what it calls.

        One that was cut off calls nothing: its last call may lack what belongs to it.
        """
        tools = self.tools if is_whole else ()
        return parse_tool_calls(text, self.dialect, tools)
