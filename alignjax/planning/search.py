"""The search for a layout: meshes, then rematerialisation and microbatches around the best."""

import dataclasses
import itertools
import math
import sys

from alignjax import config as configs
from alignjax.config import Config
from alignjax.planning import plans, remat
from alignjax.planning.plans import Estimate
from alignjax.planning.printing import format_estimates
from alignjax.planning.topologies import devices_of, slices_of

LARGEST_TENSOR = 8


def search(config: Config, topology: str) -> list[Estimate]:
    """Return all plans that were tried, the best first: it fits, and has the lowest floor.

    If `topology` names a platform without a slice, its slices are tried from the smallest on,
    until one fits.
    """
    tried = []
    for slice_topology in slices_of(topology):
        tried = search_slice(config, slice_topology) + tried
        if tried[0].fits:
            break
    return tried


def search_slice(config: Config, topology: str) -> list[Estimate]:
    """Return the plans for one slice, the best first.

    Every mesh is tried that the state fits on; around the best of them, other rematerialisation
    and then other sizes of microbatches.
    """
    devices = len(devices_of(topology))
    if config.ppo.rollout_tensor:  # no more than there are devices
        tensor = math.gcd(config.ppo.rollout_tensor, devices)
        ppo = dataclasses.replace(config.ppo, rollout_tensor=tensor)
        config = dataclasses.replace(config, ppo=ppo)
    trials = Trials(config, topology)
    for mesh in meshes(devices, config):
        trials.attempt(dataclasses.asdict(mesh), config.model.remat, config.microbatch_tokens)
    best = trials.best()
    if best.rows:
        for level in remat.LEVELS:
            trials.attempt(best.mesh, level, best.microbatch_tokens)
    best = trials.best()
    if best.rows:
        for tokens in (best.microbatch_tokens // 2, best.microbatch_tokens * 2):
            trials.attempt(best.mesh, best.remat, tokens)
    return trials.in_order()


class Trials:
    """The layouts of one slice that have been tried, each once."""

    def __init__(self, config: Config, topology: str):
        self.config = config
        self.topology = topology
        self.estimates: dict[tuple, Estimate] = {}

    def attempt(self, mesh: dict[str, int], level: str, microbatch_tokens: int) -> None:
        """Plan a layout unless it has been tried; compile it only if the state fits."""
        key = (tuple(mesh.values()), level, microbatch_tokens)
        if key in self.estimates:
            return
        config = dataclasses.replace(
            self.config,
            mesh=configs.Mesh(**mesh),
            microbatch_tokens=microbatch_tokens,
            model=dataclasses.replace(self.config.model, remat=level),
        )
        estimate = plans.lower_bound(config, self.topology)
        if estimate.fits:
            estimate = plans.make_plan(config, self.topology, stop=True)
        self.estimates[key] = estimate
        print(format_estimates([estimate]), file=sys.stderr, flush=True)

    def in_order(self) -> list[Estimate]:
        return sorted(self.estimates.values(), key=preference)

    def best(self) -> Estimate:
        return min(self.estimates.values(), key=preference)


def preference(estimate: Estimate) -> tuple[bool, tuple[float, float]]:
    """Return a key that sorts the best first."""
    return not estimate.fits, (estimate.floor, estimate.peak)


def meshes(devices: int, config: Config) -> list[configs.Mesh]:
    """Return the meshes of so many devices that divide heads and widths.

    Those with the fewest copies of the state come first.
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    possible = [
        configs.Mesh(data, fsdp, tensor)
        for data, fsdp, tensor in itertools.product(divisors, repeat=3)
        if data * fsdp * tensor == devices
        and tensor <= LARGEST_TENSOR
        and config.model.kv_heads % tensor == 0
        and config.model.d_model % fsdp == 0
    ]
    return sorted(possible, key=copies_of_the_state)


def copies_of_the_state(mesh: configs.Mesh) -> tuple[int, int]:
    return mesh.data, mesh.tensor
