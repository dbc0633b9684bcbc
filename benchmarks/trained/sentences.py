"""English sentences, and the tokens that BERT makes of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LENGTH = 16
"""Tokens of a sentence at most; shorter ones are filled up."""
SENTENCES = """
The river had risen so far overnight that the lower bridge was closed to traffic.
How do I reset the password of an account that I have not used for two years?
A cat is asleep on the warm bonnet of a parked car.
Interest rates stayed where they were, although most economists had expected a cut.
She plays the violin in the evenings and repairs old clocks at weekends.
Water boils at a lower temperature in the mountains than at the coast.
Please send the invoice to our new address in Lisbon.
The telescope found a faint galaxy whose light is thirteen billion years old.
Two children are building a castle out of wet sand.
This recipe needs four eggs, a cup of flour and a pinch of salt.
The train to Prague leaves from platform nine at a quarter past six.
He lost the match in five sets after holding three match points.
Vaccination has reduced the number of cases by more than ninety percent.
My laptop gets very hot and the fan runs all the time.
Old maps show a village here that was abandoned after the great storm.
The committee voted against the proposal by seven to four.
What is the difference between a crocodile and an alligator?
Bees tell each other by dancing where the flowers are.
The museum is closed on Mondays and on public holidays.
A man in a red jacket is climbing a frozen waterfall.
The new engine uses a third less fuel than the one that it replaces.
I would recommend this hotel to anyone who likes quiet gardens.
Learning a language takes patience, practice and a little courage.
The court ruled that the contract had never been valid.
Snow fell in the desert for the first time in forty years.
Our team is looking for an engineer with experience in embedded systems.
The patient was given antibiotics and felt better after two days.
Nobody knows who wrote the poem, but everyone in the town can recite it.
The price of coffee has doubled since the harvest failed.
Turn left at the church and follow the road to the harbour.
A dog is jumping over a low wooden fence to catch a ball.
The sum of the angles of a triangle is one hundred and eighty degrees.
They painted the kitchen yellow because the winters are long and dark.
The volcano has been quiet for a century, yet the ground around it is rising.
Is it safe to eat bread with a little mould on the crust?
The orchestra tuned their instruments while the audience took their seats.
Fishermen complain that the nets come up full of plastic.
The algorithm sorts a million numbers in less than a second.
Her grandmother kept every letter that he had sent from the front.
The company will open its third factory in Vietnam next spring.
Several people are waiting for a bus in the rain.
Solar panels on the roof cover most of what the house consumes.
The referee stopped the game when the floodlights went out.
Which vitamins are there in carrots, and do they help the eyes?
An apple fell from the tree and rolled down to the gate.
The library lends books, films, tools and musical instruments.
Ancient traders carried silk and spices along this valley.
If the pressure drops below two bars, the valve closes by itself.
The actress thanked her parents, her teachers and her dog.
We walked for hours through a forest of birch and pine.
The printer says that it is out of paper, but the tray is full.
Whales sing songs that travel hundreds of kilometres under water.
The government promised to build forty thousand flats a year.
Someone is slicing onions on a wooden board.
The battery of this phone lasts two days if the screen is dim.
Children who read for pleasure do better at school.
The bank refused the loan because the business plan was too vague.
A flock of geese crossed the sky in the shape of an arrow.
The surgeon washed her hands for the third time that morning.
Could you tell me where the nearest pharmacy is?
The novel begins with a funeral and ends with a wedding.
Engineers are testing a bridge that can repair its own cracks.
The dog barked at the postman, as it did every morning.
Light from the window fell on a half finished game of chess.
""".strip().splitlines()


def tokens(vocabulary: Path) -> dict[str, NDArray[np.int64]]:
    """The sentences as ``tokens`` and ``mask``, both (sentences, 16)."""
    known = {word: index for index, word in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}
    ids = np.full((len(SENTENCES), LENGTH), known["[PAD]"])
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(SENTENCES):
        pieces = [piece for word in re.findall(r"\w+|[^\w\s]", sentence.lower()) for piece in cut(word, known)]
        pieces = ["[CLS]", *pieces[: LENGTH - 2], "[SEP]"]
        ids[row, : len(pieces)] = [known[piece] for piece in pieces]
        mask[row, : len(pieces)] = 1
    return {"tokens": ids, "mask": mask}


def cut(word: str, known: dict[str, int]) -> list[str]:
    """The longest pieces of a word that are known, from its start (Wu et al., arXiv 1609.08144, section 4.1)."""
    pieces: list[str] = []
    start = 0
    while start < len(word):
        mark = "##" if start else ""
        end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in known), None)
        if end is None:
            return ["[UNK]"]
        pieces.append(mark + word[start:end])
        start = end
    return pieces
