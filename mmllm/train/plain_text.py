"""A small fixed text of many kinds, written for this project; where a word changes, figures can't be compared."""

TEXTS = (
    "The river rises in the hills north of the town and runs for about forty kilometres before it reaches the "
    "sea. In spring, when the snow melts, it often floods the meadows along its lower course. Farmers have "
    "learned to keep their animals on higher ground until the end of April, and to plant the low fields only "
    "in May.",
    "To make a simple soup, cut two onions and three carrots into small pieces and cook them in a little oil "
    "for five minutes. Add a litre of water, a handful of lentils and some salt. Let it boil gently for half "
    "an hour, then taste it. If it is too thick, add more water; if it is too thin, cook it a little longer "
    "without the lid.",
    '"Did you lock the door?" asked Maria. Her brother stopped on the stairs and felt in his pockets. "I '
    'thought you had the key," he said. They looked at each other for a moment, and then both of them began to '
    "laugh, because the key was still hanging around his neck on a piece of red string.",
    "A train leaves the station at 9:15 and travels 180 kilometres at an average speed of 90 kilometres per "
    "hour. The journey takes two hours, so the train arrives at 11:15. If it had travelled at 120 kilometres "
    "per hour, it would have needed one hour and a half, and would have arrived at 10:45.",
    "def count_words(text):\n    counts = {}\n    for word in text.lower().split():\n        counts[word] = "
    'counts.get(word, 0) + 1\n    return counts\n\n\nprint(count_words("the cat and the dog"))\n',
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the pressure of the air is lower, and "
    "water boils at a lower temperature. That is why it takes longer to cook potatoes there: although the "
    "water is boiling, it is not as hot as it would be at the coast.",
    "Dear Mr Collins, thank you for your letter of 3 March. We are sorry to hear that the lamp you ordered "
    "arrived broken. A new one was sent to you this morning and should reach you within three working days. "
    "You do not need to return the old one. Yours sincerely, the customer service team.",
    "The council voted on Tuesday to close the old bridge to cars from next summer. Cyclists and people on "
    "foot will still be able to use it. Shop owners on both banks had asked for another year to prepare, but "
    "the engineers' report said that repairs could not wait. The work is expected to last eighteen months.",
    "Plants take in carbon dioxide through small openings in their leaves and water through their roots. With "
    "the energy of sunlight they turn both into sugar, and oxygen is set free. At night, when there is no "
    "light, they breathe as animals do: they use oxygen and give off carbon dioxide.",
    "Question: Which is heavier, a kilogram of feathers or a kilogram of iron?\nAnswer: Neither. Both weigh "
    'one kilogram; the feathers only take up more space.\n\nQuestion: What is the opposite of "early"?\n'
    'Answer: The opposite of "early" is "late".',
)
