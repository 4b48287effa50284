"""Questions whose answers repeat them, and others, for the measurement of speculation."""

from __future__ import annotations

_TIDES = """\
The tide mill at Carew stands on a dam of limestone across the Carew River in Pembrokeshire. The \
first mill on this site was recorded in 1542, and the present building was put up around 1801. \
Twice a day the rising tide filled a pond of nine hectares through gates in the dam. When the \
tide fell, the gates closed under the weight of the water, and the miller let the pond run out \
through two wheels of cast iron, each of which drove three pairs of stones. The mill ground corn \
for the farms of the estuary until 1918, and bones for fertiliser until 1937. It was restored in \
1972 and is the only tide mill in Wales whose machinery is complete. The mill, the castle beside \
it and the walk of a mile around the pond are open from Easter to October. Some 30,000 people \
visit the mill in a year, and the money goes to the upkeep of the dam, which loses a few stones \
in every winter."""

_MINUTES = """\
Minutes of the garden committee, 14 March. Present: Ruth Alder (chair), Tomas Vrba, Ines Duarte, \
Paul Okafor. Apologies: Mei Lin. Ruth Alder reported that the council has agreed to lease the \
plot behind the library for another five years, at a rent of 120 pounds a year. Tomas Vrba \
reported that the water tank leaks and that a new one costs 340 pounds; the committee agreed to \
buy it before the end of April. Ines Duarte presented the plan for the school's visits: three \
classes will come in May, each on a Thursday morning, and each class will plant one bed of beans \
and one bed of sunflowers. Paul Okafor asked for volunteers to repair the fence on the north \
side. Ruth Alder and Tomas Vrba will help him on Saturday, 22 March. The treasurer's balance \
stands at 1,415 pounds. The next meeting of the garden committee is on 11 April in the library."""

_BATTERY = """\
Lithium iron phosphate batteries have taken over much of the market for home storage. They hold \
less energy in a kilogram than batteries with nickel and cobalt, but a battery on a cellar wall \
needn't be light. They last for more cycles: after 6,000 full cycles a typical lithium iron \
phosphate battery still holds 80 percent of its first capacity, where a nickel battery of the \
same price holds as much after 2,000. They are harder to set on fire, because the phosphate keeps \
its oxygen when it gets hot. And they hold no cobalt, most of which is mined in one country. \
Their weakness is the cold: below freezing they can't be charged without damage, so batteries in \
garages need a heater. In 2023 about 60 percent of the home batteries that were sold in Germany \
were lithium iron phosphate batteries."""

_LETTER = """\
Dear Mrs. Hartley,
Thank you for your order of 3 May. We are sorry to tell you that the oak shelf you ordered is out \
of stock until 20 June. The brass hooks and the pine bench you ordered will be sent to you on 9 \
May, and should arrive at your address in Leeds within three working days. If you would rather \
have the shelf in beech, which is in stock, please call us on 0113 555 0192 or write to \
orders@example.com, and we will send it together with the bench. The price of the shelf in beech \
is 64 pounds, which is 11 pounds less than the price of the shelf in oak. We would return the \
difference to your card.
Yours sincerely,
Daniel Foster
Foster and Daughters, Joiners"""

_RECIPE = """\
Potato soup. Peel 800 grams of potatoes and cut them into cubes. Chop two onions and one leek. \
Melt 40 grams of butter in a large pot and cook the onions and the leek for five minutes without \
letting them brown. Add the potatoes and one litre of vegetable stock, bring the pot to the boil, \
and simmer the soup for twenty minutes. Take the pot off the heat and mash half of the potatoes \
in the pot. Stir in 200 millilitres of cream, a pinch of nutmeg, salt and pepper. Serve the soup \
with chopped parsley and slices of toasted rye bread. The soup keeps for three days in the \
refrigerator."""

_STOCK = '''\
class Stock:
    """How many of each article lie in the store."""

    def __init__(self):
        self.counts = {}

    def add(self, article, count):
        if count < 1:
            raise ValueError(f"count must be positive, not {count}")
        self.counts[article] = self.counts.get(article, 0) + count

    def remove(self, article, count):
        if count < 1:
            raise ValueError(f"count must be positive, not {count}")
        if self.counts.get(article, 0) < count:
            raise ValueError(f"there are not {count} of {article}")
        self.counts[article] = self.counts[article] - count
'''

_HANDLERS = """\
def handle_get(request, store):
    item = store.find(request.item_id)
    if item is None:
        return Response(404, {"error": "no such item", "item_id": request.item_id})
    return Response(200, item.as_dict())


def handle_put(request, store):
    item = store.find(request.item_id)
    if item is None:
        return Response(404, {"error": "no such item", "item_id": request.item_id})
    item.update(request.body)
    store.save(item)
    return Response(200, item.as_dict())
"""

_TABLE = """\
CREATE TABLE customers (
    customer_id INTEGER PRIMARY KEY,
    first_name VARCHAR(100) NOT NULL,
    last_name VARCHAR(100) NOT NULL,
    email VARCHAR(200) NOT NULL,
    created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE orders (
    order_id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (customer_id),
    total_amount NUMERIC(10, 2) NOT NULL,
    created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
);
"""

_TESTS = """\
import unittest

from shapes import Circle, Rectangle, Triangle


class RectangleTest(unittest.TestCase):
    def test_area(self):
        rectangle = Rectangle(width=3, height=4)
        self.assertEqual(rectangle.area(), 12)

    def test_perimeter(self):
        rectangle = Rectangle(width=3, height=4)
        self.assertEqual(rectangle.perimeter(), 14)

    def test_width_must_be_positive(self):
        with self.assertRaises(ValueError):
            Rectangle(width=0, height=4)
"""

# Two questions about each text, so that the first half of a list asks about all of them.
SUMMARISE = (
    f"Summarise the following text in three sentences, with its own words.\n\n{_TIDES}",
    f"Summarise these minutes as a list: who does what, and when.\n\n{_MINUTES}",
    f"What are the key points of this text? Quote it where you can.\n\n{_BATTERY}",
    f"Summarise this letter in a few sentences.\n\n{_LETTER}",
    f"When was the mill built, what did it grind, and when? Quote the text.\n\n{_TIDES}",
    f"What was decided at this meeting?\n\n{_MINUTES}",
    f"Name the advantages and the weakness of these batteries in short.\n\n{_BATTERY}",
    f"What has happened to the order, and what can the customer do?\n\n{_LETTER}",
)
EDIT = (
    f"Repeat the following text exactly, but write 'watermill' instead of 'tide mill'.\n\n{_TIDES}",
    f"Repeat this letter, with every 'oak' changed to 'walnut'.\n\n{_LETTER}",
    f"Correct the spelling of this text and change nothing else.\n\n{_BATTERY}",
    f"Write this recipe again with 'sweet potatoes' in place of 'potatoes'.\n\n{_RECIPE}",
    f"Rewrite this text in the present tense and keep everything else.\n\n{_TIDES}",
    f"Repeat this letter, but to Mr. Bennett in York.\n\n{_LETTER}",
    f"Repeat this text with 'LFP' in place of 'lithium iron phosphate'.\n\n{_BATTERY}",
    f"Write this recipe again for twice as many people.\n\n{_RECIPE}",
)
CODE = (
    f"Continue this Python class with the methods move and count.\n\n```python\n{_STOCK}```",
    f"Continue this module with handle_delete and handle_post.\n\n```python\n{_HANDLERS}```",
    f"Add the tables products and order_lines in the same style.\n\n```sql\n{_TABLE}```",
    f"Write the same tests for Circle and Triangle.\n\n```python\n{_TESTS}```",
    f"Add type annotations to this class.\n\n```python\n{_STOCK}```",
    f"Rename store to repository in this module.\n\n```python\n{_HANDLERS}```",
    f"Rename the column email to email_address in this schema.\n\n```sql\n{_TABLE}```",
    f"Rewrite these tests for pytest, as functions.\n\n```python\n{_TESTS}```",
)
STORIES = (
    "Write a story about a lighthouse keeper who finds a letter in a bottle.",
    "Tell me about a dream in which the moon came down to a village.",
    "Invent a conversation between a river and the bridge that crosses it.",
    "Write a story about a clockmaker who runs out of time.",
    "Describe a market on another planet, with its smells and its noises.",
    "Write a story about two sisters, a storm and a borrowed boat.",
    "Imagine the diary of the last elephant of a circus.",
    "Write a story about a town where nobody can tell a lie.",
)
