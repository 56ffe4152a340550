"""A made-up attention layer with the structure that real ones have, for the main job and tests.

Logits are sums of known parts: a sink at the first tokens, neighbours, segments of the text whose
topics are more or less related, planted needles, and noise. All heads look at the same places, from
narrow heads that rest on the sink and on their neighbours to wide ones that take in much of the
text, so that they need different numbers of blocks. A needle is a short run of keys that answers to
one question only: a short run of queries in the last quarter of the prompt.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_NEEDLES = 16
NEEDLE_TOKENS = 8  # of a needle and of a question; at least the largest stride
SINK_TOKENS = 4
NUM_TOPICS = 64
TOPIC_SIZE = 4  # dimensions of a topic: few, so that topics resemble each other more or less
SEGMENT_TOKENS = (32, 256)  # shortest and longest stretch of one topic
LOCAL_TOKENS = (16, 256)  # reach of the sharpest and of the widest neighbourhood feature
# Logits that the narrowest and the widest head give to each part. A sink's are counted from where
# it weighs as much as all other tokens together; a topic's are those of its own tokens.
SINK_NATS = (3.0, -5.0)
LOCAL_NATS = (3.5, 0.0)
TOPIC_NATS = (7.0, 3.0)
NOISE_NATS = (1.0, 0.5)
KEY_SCALE = 8.0  # of key features; queries are scaled back, so that both stay small numbers


@dataclass(frozen=True)
class Layer:
    """One attention layer's input and what was planted in it."""

    q: Tensor  # [1, N, Hq, D]
    k: Tensor  # [1, N, Hkv, D]
    v: Tensor  # [1, N, Hkv, D]
    questions: Tensor  # int64 [P], last token of each question
    codes: Tensor  # [P, D], what the values of needle p spell


@dataclass(frozen=True)
class _Strengths:
    """Logits, in nats, that each head gives to each part; fp32 [Hq]."""

    sink: Tensor
    local: Tensor
    topic: Tensor
    needle: Tensor
    noise: Tensor


def make_layer(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> Layer:
    """Builds the layer: the same one for the same arguments on the same kind of device."""
    random = torch.Generator(device=device).manual_seed(seed)
    strengths = _strengths(length, heads, random)
    topics = _topics(length, random)
    needles, questions = _needle_tokens(length, random)
    part = head_dim // 4
    local = _local_features(length, part, random)
    directions = _unit(torch.randn(NUM_NEEDLES, part, generator=random, device=device))
    codes = torch.randn(NUM_NEEDLES, head_dim, generator=random, device=device)
    base_topics = _topic_directions(part, random)

    q = torch.empty(1, length, heads, head_dim, dtype=dtype, device=device)
    k = torch.empty(1, length, kv_heads, head_dim, dtype=dtype, device=device)
    v = torch.empty(1, length, kv_heads, head_dim, dtype=dtype, device=device)
    group = heads // kv_heads
    for kv_head in range(kv_heads):
        # Every kv head has a view of its own of the topics.
        topic = _unit(base_topics + 0.5 * _topic_directions(part, random))[topics]
        values = torch.randn(length, head_dim, generator=random, device=device)
        values[needles] = codes[:, None]
        v[0, :, kv_head] = values

        features = torch.zeros(length, head_dim, device=device)
        features[:, :part] = local
        features[:, part : 2 * part] = topic
        features[needles, 2 * part : 3 * part] = directions[:, None]
        features[:SINK_TOKENS, 3 * part] = 1.0
        features[:, 3 * part + 1 :] = _noise(length, part - 1, random)
        k[0, :, kv_head] = features * KEY_SCALE

        for head in range(kv_head * group, (kv_head + 1) * group):
            features[:, :part] = strengths.local[head] * local
            features[:, part : 2 * part] = strengths.topic[head] * topic
            features[:, 2 * part : 3 * part] = 0.0
            features[questions, 2 * part : 3 * part] = strengths.needle[head] * directions[:, None]
            features[:, 3 * part] = strengths.sink[head]
            noise = _noise(length, part - 1, random)
            features[:, 3 * part + 1 :] = strengths.noise[head] * noise
            q[0, :, head] = features * (math.sqrt(head_dim) / KEY_SCALE)
    return Layer(q, k, v, questions[:, -1], codes)


def _strengths(length: int, heads: int, random: torch.Generator) -> _Strengths:
    device = random.device
    # How much of the text a head takes in, from 0 to 1: every degree of it, in shuffled order.
    wide = torch.linspace(0.0, 1.0, heads, device=device)
    wide = wide[torch.randperm(heads, generator=random, device=device)]

    def about(narrowest: float, widest: float) -> Tensor:
        spread = 0.1 * abs(widest - narrowest) * torch.randn(heads, generator=random, device=device)
        return narrowest + (widest - narrowest) * wide + spread

    # A single token needs log(length) nats to weigh as much as all others together.
    total = math.log(length)
    return _Strengths(
        sink=total + about(*SINK_NATS),
        local=about(*LOCAL_NATS),
        topic=about(*TOPIC_NATS),
        needle=(total + 6.0) * about(1.2, 0.9),
        noise=about(*NOISE_NATS),
    )


def _topics(length: int, random: torch.Generator) -> Tensor:
    """Topic of every token, int64 [N]: segments of random lengths and topics."""
    shortest, longest = SEGMENT_TOKENS
    count = length // shortest + 1
    sizes = torch.randint(shortest, longest + 1, (count,), generator=random, device=random.device)
    topics = torch.randint(0, NUM_TOPICS, (count,), generator=random, device=random.device)
    return topics.repeat_interleave(sizes)[:length]


def _topic_directions(size: int, random: torch.Generator) -> Tensor:
    """What the tokens of each topic have in common, fp32 ``[NUM_TOPICS, size]``."""
    plane = torch.randn(TOPIC_SIZE, size, generator=random, device=random.device)
    return torch.randn(NUM_TOPICS, TOPIC_SIZE, generator=random, device=random.device) @ plane


def _needle_tokens(length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens of every needle and of every question, int64 [P, T] each."""
    # One needle in each of P stretches of the first three quarters, in shuffled order, and one
    # question in each of P stretches of the last quarter.
    stretch = 3 * length // (4 * NUM_NEEDLES)
    device = random.device
    slots = torch.arange(NUM_NEEDLES, device=device)
    order = torch.randperm(NUM_NEEDLES, generator=random, device=device)
    last = stretch - NEEDLE_TOKENS
    jitter = torch.randint(SINK_TOKENS, last + 1, (NUM_NEEDLES,), generator=random, device=device)
    needles = order * stretch + jitter
    questions = length - (length // (4 * NUM_NEEDLES)) * (NUM_NEEDLES - slots)
    run = torch.arange(NEEDLE_TOKENS, device=device)
    return needles[:, None] + run, questions[:, None] + run


def _local_features(length: int, size: int, random: torch.Generator) -> Tensor:
    """Unit vectors [N, size] whose products fade with the distance of the tokens."""
    count = size // 2
    near, far = LOCAL_TOKENS
    reach = torch.logspace(
        math.log10(near), math.log10(far), count, dtype=torch.float64, device=random.device
    )
    normal = torch.randn(count, dtype=torch.float64, generator=random, device=random.device)
    positions = torch.arange(length, dtype=torch.float64, device=random.device)
    phase = positions[:, None] * (normal / reach)
    return torch.cat([phase.cos(), phase.sin()], dim=1).float() / math.sqrt(count)


def _noise(length: int, size: int, random: torch.Generator) -> Tensor:
    """Vectors whose products with one another have standard deviation 1."""
    return torch.randn(length, size, generator=random, device=random.device) / size**0.25


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)
