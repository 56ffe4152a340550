"""A retrieval prompt for the small code model: source text, secret numbers in it, questions."""

import random
import sysconfig
from pathlib import Path

FIRST_WORDS = ("amber", "bold", "calm", "clever", "eager", "fancy", "golden", "hidden", "jolly")
SECOND_WORDS = ("anchor", "beacon", "canyon", "crane", "delta", "eagle", "falcon", "otter", "wolf")
NUM_STATEMENTS = 16
NUM_QUESTIONS = 12


def source_text(num_characters):
    """Python source of the standard library, each file headed by its name."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += f"\n# file: {path.name}\n" + path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= num_characters:
            break
    return text[:num_characters]


def retrieval_prompt(tokenizer, num_tokens, seed=0):
    """(ids, answers): a prompt of at most num_tokens, and for each question the positions of the
    tokens that spell its answer."""
    rng = random.Random(seed)
    names = rng.sample([f"{a} {b}" for a in FIRST_WORDS for b in SECOND_WORDS], NUM_STATEMENTS)
    numbers = {name: str(rng.randrange(10000, 100000)) for name in names}
    questions = [
        (f"\n# Question: what is the secret number of {name}? Answer:", name)
        for name in rng.sample(names, NUM_QUESTIONS)
    ]
    statements = [f"\n# The secret number of {name} is {numbers[name]}.\n" for name in names]

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    tail, answers = [], []
    for question, name in questions:
        tail += encode(question)
        answer = encode(f" {numbers[name]}")
        answers.append(range(len(tail), len(tail) + len(answer)))
        tail += answer
    room = num_tokens - len(tail) - sum(len(encode(statement)) for statement in statements)
    lines = source_text(8 * num_tokens).splitlines(keepends=True)
    body, used = [], 0
    for line in lines:
        used += len(encode(line))
        if used > room:
            break
        body.append(line)
    # From the last place to the first, so that earlier places keep their meaning.
    for place, statement in zip(
        sorted(rng.sample(range(len(body)), NUM_STATEMENTS), reverse=True), statements, strict=True
    ):
        body.insert(place, statement)
    ids = encode("".join(body)) + tail
    start = len(ids) - len(tail)
    return ids, [range(start + span.start, start + span.stop) for span in answers]


def num_right(logits, ids, answers):
    """Questions whose every answer token is the most likely one; logits [tokens, vocabulary]."""
    return sum(
        all(int(logits[position - 1].argmax()) == ids[position] for position in span)
        for span in answers
    )
