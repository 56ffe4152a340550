"""Long prompts with questions: text of installed packages, numbers hidden in it, asked at the end.

The text is Python source of the standard library and of torch, in an order drawn from the seed:
whole files for models of code, their documentation strings for models of prose. Statements of the
form "The secret number of amber falcon is 48213." stand at line breaks anywhere in it, and the
questions follow with their answers, so that one forward pass shows which of them a model knows.
"""

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

NUM_STATEMENTS = 16
MAX_QUESTIONS = 12

_CITIES = """
    Paris London Tokyo Madrid Berlin Vienna Oslo Cairo Lima Rome Dublin Athens Prague Warsaw Lisbon
    Helsinki Seoul Delhi Quito Havana Nairobi Ottawa Zurich Venice Geneva Munich Milan Naples Porto
    Krakow Bergen Malaga
"""
_ADJECTIVES = """
    amber bold calm clever coral eager fancy gentle golden hidden icy jolly lucky mellow noble olive
    proud quiet royal silver sunny tidy vivid wise
"""
_NOUNS = """
    anchor badger beacon breeze canyon castle cloud crane delta eagle falcon forest glacier harbor
    island lantern maple otter pebble raven spruce tower willow wolf
"""
_LEAST_DOCSTRING = 200  # characters; shorter ones are hardly prose
_MAX_DOCSTRINGS = 20_000  # characters of one file, so that a prompt holds many files


@dataclass(frozen=True)
class Style:
    """What a prompt is made of; in the forms ``{0}`` is a name and ``{1}`` its number."""

    names: tuple[str, ...]
    statement: str
    question: str
    answer: str
    after_answer: str

    def text_of(self, path: Path) -> str:
        source = path.read_text(encoding="utf-8", errors="replace")
        if self is STYLES["code"]:
            return f"\n# file: {path.name}\n{source}"
        return "\n\n".join(_docstrings(source))[:_MAX_DOCSTRINGS] + "\n\n"


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # the source is not ours
            warnings.simplefilter("ignore")
            module = ast.parse(source)
    except SyntaxError:
        return
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(module):
        text = ast.get_docstring(node) if isinstance(node, holders) else None
        if text and len(text) >= _LEAST_DOCSTRING:
            yield text


STYLES = {
    "code": Style(
        names=tuple(
            f"{first} {second}" for first in _ADJECTIVES.split() for second in _NOUNS.split()
        ),
        statement="\n# The secret number of {0} is {1}.\n",
        question="\n# Question: what is the secret number of {0}? Answer:",
        answer=" {1}",
        after_answer="",
    ),
    "prose": Style(
        names=tuple(_CITIES.split()),
        statement="\nThe secret number of {0} is {1}.\n",
        question="\nThe secret number of {0} is ",
        answer="{1}",
        after_answer=".",
    ),
}


@dataclass(frozen=True)
class Prompt:
    ids: torch.Tensor  # int64 [tokens]
    text_end: int  # tokens before the first question
    answers: list[range]  # positions of the tokens of each answer


def make_prompts(
    tokenizer, style: Style, length: int, num_questions: int, seed: int
) -> list[Prompt]:
    """Prompts of ``length`` tokens with ``num_questions`` questions together."""
    prompts = []
    for first in range(0, num_questions, MAX_QUESTIONS):
        asked = min(MAX_QUESTIONS, num_questions - first)
        rng = random.Random(f"{seed} {length} {len(prompts)}")
        prompts.append(_make_prompt(tokenizer, style, length, asked, rng))
    return prompts


def _make_prompt(
    tokenizer, style: Style, length: int, num_questions: int, rng: random.Random
) -> Prompt:
    def encode(form: str, *values: str) -> list[int]:
        return tokenizer(form.format(*values), add_special_tokens=False)["input_ids"]

    names = rng.sample(style.names, NUM_STATEMENTS)
    numbers = {name: str(rng.randrange(10_000, 100_000)) for name in names}
    statements = [encode(style.statement, name, numbers[name]) for name in names]
    questions, spans = [], []
    for name in rng.sample(names, num_questions):
        questions += encode(style.question, name)
        answer = encode(style.answer, name, numbers[name])
        spans.append(range(len(questions), len(questions) + len(answer)))
        questions += answer
        if style.after_answer:
            questions += encode(style.after_answer)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(start) - len(questions) - sum(map(len, statements))
    lines = _lines(tokenizer, style, room, rng)
    if len(lines) <= NUM_STATEMENTS:
        raise ValueError(
            f"quality: length must leave more than {NUM_STATEMENTS} lines of text beside the "
            f"statements and questions, got length={length}"
        )
    places = sorted(rng.sample(range(1, len(lines)), NUM_STATEMENTS), reverse=True)
    for place, statement in zip(places, statements, strict=True):
        lines.insert(place, statement)
    text = start + [token for line in lines for token in line]
    answers = [range(len(text) + span.start, len(text) + span.stop) for span in spans]
    return Prompt(torch.tensor(text + questions), len(text), answers)


def _lines(tokenizer, style: Style, num_tokens: int, rng: random.Random) -> list[list[int]]:
    """Lines of text as tokens, exactly ``num_tokens`` of them together."""
    lines, left = [], num_tokens
    for text in _texts(style, rng):
        for line in _tokens_by_line(tokenizer, text):
            if left <= 0:
                return lines
            lines.append(line[:left])
            left -= len(lines[-1])
    raise ValueError(f"quality: length must not exceed the text at hand, short of {left} tokens")


def _tokens_by_line(tokenizer, text: str) -> Iterator[list[int]]:
    """The tokens of the whole text, cut before line breaks: some reach from line to line."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    line = []
    for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if line and text[start : start + 1] == "\n":
            yield line
            line = []
        line.append(token)
    if line:
        yield line


def _texts(style: Style, rng: random.Random) -> Iterator[str]:
    paths = list(_source_files())
    rng.shuffle(paths)
    for path in paths:
        text = style.text_of(path)
        if text.strip():
            yield text


@cache
def _source_files() -> tuple[Path, ...]:
    """Sorted by their path below the folder they come from, which no machine changes."""
    library, package = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent
    found = {path.relative_to(package): path for path in package.rglob("*.py")}
    for path in (*library.glob("*.py"), *library.glob("*/*.py")):
        name = path.relative_to(library)
        if name.parts[0] not in ("site-packages", "dist-packages", "test"):
            found[name] = path
    return tuple(found[name] for name in sorted(found))
