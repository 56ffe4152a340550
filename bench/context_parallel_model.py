"""What a context parallel call should take on so many ranks, from what one GPU takes and what links
carry.

Of one GPU's time T all but the pooling of keys, P, is divided by W: a rank pools the keys up to the
ends of both of its chunks. Groups of heads follow one another, and the gather of one lasts as long
as the keys and values of the other ranks take through the slowest link on their way; the first has
nothing to hide behind. Before it ranks agree, and shares are made:

    work(W)   = (T - P) / W + P * (2W + 1) / 2W
    gather(W) = latency + (W - 1) / W * bytes / G / bandwidth        of one of G groups
    time(W)   = before + gather + (G - 1) * max(gather, work / G) + work / G
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """How ranks are connected: the bytes per second that reach each while all gather."""

    bandwidth: float
    latency: float  # seconds of a gather of nothing


@dataclass(frozen=True)
class Problem:
    kv_bytes: float  # keys and values of the whole sequences
    groups: int  # of heads, gathered one after another
    one_gpu: float  # seconds
    pooling: float  # seconds of one_gpu that go into the pooling of keys; 0 for dense attention
    before: float  # seconds for agreement and shares

    def work(self, world: int) -> float:
        chunk_ends = (2 * world + 1) / (2 * world) if world > 1 else 1.0
        return (self.one_gpu - self.pooling) / world + self.pooling * chunk_ends

    def gather(self, world: int, links: Links) -> float:
        """Seconds of one group."""
        arriving = self.kv_bytes / self.groups * (world - 1) / world
        return links.latency + arriving / links.bandwidth

    def seconds(self, world: int, links: Links) -> float:
        work, gather = self.work(world) / self.groups, self.gather(world, links)
        return self.before + gather + (self.groups - 1) * max(work, gather) + work

    def speedup(self, world: int, links: Links) -> float:
        return self.one_gpu / self.seconds(world, links)

    def hidden(self, world: int, links: Links) -> float:
        """The part of the gathers' time that work covers."""
        gather = self.gather(world, links)
        covered = (self.groups - 1) * min(gather, self.work(world) / self.groups)
        return covered / (self.groups * gather) if gather > 0 else 1.0
