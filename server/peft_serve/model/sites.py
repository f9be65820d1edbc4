"""Sites: the places of the resident model where adapters act.

`AdaptedSites` finds them, binds each module's `forward` to a site's (the module tree and the parameter names
stay as they are), keeps what the installed adapters do there, and divides each stream's tokens among them.
It owns the layout of the hot stacks. It knows no request and no step, ignores what an adapter does at
sequence level, and never changes a parameter of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from weakref import WeakSet

import torch
from torch import nn

from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.primitives import Adapter, Edit, is_finite
from peft_serve.adapters.sublayer_primitives import Intervention
from peft_serve.core import BASE_SLOT
from peft_serve.kernels.low_rank import LowRankKernels
from peft_serve.kernels.row_ops import RowOps
from peft_serve.model.attention_site import AttentionSite
from peft_serve.model.carrier import Carried
from peft_serve.model.edit_check import check_edit
from peft_serve.model.extents import Extent
from peft_serve.model.manner import Act, Manner, Manners, acts_of
from peft_serve.model.packing import FEWEST_WEIGHTS, Pack, Places, packed_linear
from peft_serve.model.routing import Lane, Route, Stream, divided
from peft_serve.model.site_binding import bound_sites, shared_sites
from peft_serve.model.site_specs import spec_of
from peft_serve.model.sites_forward import DenseSite, NormSite, Site
from peft_serve.model.sites_terms import drop_all, put_all
from peft_serve.model.stacks import Moves, StackLayout, width_of
from peft_serve.model.sublayer_places import sublayers_of
from peft_serve.model.sublayers import close_sublayer
from peft_serve.model.terms.shared import SharedFactors
from peft_serve.model.terms.term import OtherKernels, UsesOthers


@dataclass(frozen=True, slots=True, eq=False)
class Installed:
    """What a slot holds, from its install to its removal. One equals itself alone: who comes next is another."""

    slot: int
    sites: tuple[Site, ...]
    streams: frozenset[Stream]
    max_rank: int
    has_extents: bool  # it asks where in their sequences its tokens stand
    acts: frozenset[Act]  # adapters with the same acts differ in their numbers alone


class AdaptedSites:
    """Every site of a model, and the adapters installed in them.

    `stream_of` says by module path which tokens a site sees. Two paths of one module may name different
    streams; such a module follows the one that was routed last. One thread at a time.
    """

    def __init__(self, model: nn.Module, *, stream_of: Callable[[str], Stream]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        specs = {path: spec for path, module in modules.items() if (spec := spec_of(path, module)) is not None}
        self._sublayers = sublayers_of(model)
        self._modules = {path: modules[path] for path in specs}
        specs |= {path: around.spec for path, around in self._sublayers.items()}
        self.specs: Mapping[str, SiteSpec] = MappingProxyType(specs)
        self._streams = {path: stream_of(path) for path in self._modules}
        self._streams |= {path: stream_of(around.stream_path) for path, around in self._sublayers.items()}
        self._like = next(p for p in model.parameters() if p.is_floating_point()).new_empty(0)
        self._device = next(model.parameters()).device
        self._lanes = {stream: Lane() for stream in Stream}
        self._layout = StackLayout()
        self._installed: dict[int, Installed] = {}
        self._acting: tuple[Route | None, frozenset[Site]] = (None, frozenset())
        self._manner: tuple[Route | None, Manner | None] = (None, None)
        self._manners = Manners()
        self._vetted: WeakSet[Adapter] = WeakSet()
        self._shared_paths: dict[Stream, set[str]] = {}  # beside each path's own stream
        self._factors = SharedFactors()
        lanes = {path: self._lanes[stream] for path, stream in self._streams.items()}
        self._sites = bound_sites(self._modules, self._sublayers, self.specs, lanes, self._factors, self._like)
        self._deltas = [s.dense.delta for s in dict.fromkeys(self._sites.values()) if isinstance(s, DenseSite)]
        self._shared = shared_sites(self._sites, self._streams)

    @property
    def at(self) -> Mapping[str, Site]:
        """Every site by its paths."""
        return MappingProxyType(self._sites)

    def acting(self, route: Route) -> frozenset[Site]:
        """The sites that adapters of a route have an edit of."""
        if self._acting[0] is not route:
            slots = [self._installed[slot].sites for slot in route.active]
            self._acting = route, frozenset(site for sites in slots for site in sites)
        return self._acting[1]

    def manner(self, route: Route | None) -> Manner | None:
        """What the adapters of a route do to the sites; None without a route."""
        if self._manner[0] is not route:
            acts = () if route is None else (self._installed[slot].acts for slot in route.active)
            self._manner = route, None if route is None else self._manners.of(acts)
        return self._manner[1]

    @property
    def generation(self) -> int:
        """Another number whenever an adapter has come or gone."""
        return self._manners.generation

    @property
    def num_slots(self) -> int:
        """One more than the largest slot that holds an adapter."""
        return 1 + max(self._installed, default=BASE_SLOT)

    def installed(self, slot: int) -> Installed:
        """What the slot holds now. ValueError for a slot that is empty."""
        if slot not in self._installed:
            raise ValueError(f"slot {slot} is empty; install an adapter before its tokens are routed")
        return self._installed[slot]

    def has(self, installed: Installed) -> bool:
        """Whether it has been there all the time since."""
        return self._installed.get(installed.slot) is installed

    @contextmanager
    def captured(self, slots: frozenset[int], route_of: Callable[[frozenset[int]], Route]) -> Iterator[None]:
        """Inside the block the tokens of a decoder have routes of the caller's own making, each for the adapters that
        act in its stream. No such token is one of a prompt where its adapter asks for that (`has_extents`)."""
        try:
            for stream in (Stream.TARGET, Stream.HEAD):
                lane = self._lanes[stream]
                for site in self._shared[stream]:
                    site.lane = lane
                adapted = frozenset(slot for slot in slots if stream in self._installed[slot].streams)
                lane.route = route_of(adapted) if adapted else None
            yield
        finally:
            self.clear()

    @property
    def beside_attention(self) -> Mapping[nn.Module, AttentionSite]:
        """The sites that want to see what their attention sees; for `RaggedAttention.watched`."""
        sites = ((module, self._sites[path]) for path, module in self._modules.items())
        return {module: site for module, site in sites if isinstance(site, AttentionSite)}

    def pack(self, pack: Pack = packed_linear, *, fewest: int = FEWEST_WEIGHTS, places: Places = None) -> None:
        """Run every Linear and Conv1D of at least so many weights from a packed copy of them; see `packing`."""
        for site in {id(site): site for site in self._sites.values()}.values():
            if isinstance(site, DenseSite) and site.num_packable >= max(1, fewest):
                site.pack(pack, places)

    def run_norms_by(self, ops: RowOps) -> None:
        """Run the base's norms by a kernel from now on, where it can."""
        for site in dict.fromkeys(self._sites.values()):
            if isinstance(site, NormSite):
                site.run_by(ops)

    def run_low_rank_by(self, kernel: LowRankKernels) -> None:
        """Run low-rank terms by a kernel from now on, where it can. No adapter is installed yet."""
        for delta in self._deltas:
            delta.use(kernel)

    def run_others_by(self, kernels: OtherKernels) -> None:
        """Run mixers and bottlenecks by kernels from now on, where they can. No adapter is installed yet."""
        for term in {term for site in self._sites.values() for term in site.terms if isinstance(term, UsesOthers)}:
            term.use_others(kernels)

    def close(self) -> None:
        """Give every module its own forward back."""
        self.clear()
        for path in self._sublayers:
            close_sublayer(self._sites[path])
        for path, module in self._modules.items():
            if module.__dict__.get("forward") == self._sites[path].forward:
                del module.__dict__["forward"]

    def vet(self, adapter: Adapter) -> None:
        """Look an adapter over before it is installed, on any thread; ValueError as `install` has it."""
        seen: set[Site] = set()
        for path, edit in adapter.sites.items():
            if path not in self.specs:
                raise ValueError(f"the base has no site '{path}'; compile the adapter for this base")
            check_edit(self.specs[path], edit)
            if self._sites[path] in seen:
                raise ValueError(f"'{path}' is another path of a module the adapter already edits; name it once")
            seen.add(self._sites[path])
        if not is_finite(adapter):
            raise ValueError("the adapter holds values that are not finite; its neighbours share its GEMMs")
        self._vetted.add(adapter)

    def install(self, slot: int, adapter: Adapter, carried: Carried | None = None) -> None:
        """Put an adapter's edits into an empty slot. ValueError leaves the slot empty and everything else as it was.

        `carried` is the same adapter on its way to the device. Routes end here: the next pass needs new ones.
        """
        edits = self._accepted(slot, adapter)
        waits = {}
        if carried is not None:
            edits = {self._sites[path]: edit for path, edit in carried.adapter.sites.items()}
            waits = {self._sites[path]: partial(carried.wait, stage) for path, stage in carried.stages.items()}
        self._forget_routes()
        try:
            put_all(slot, edits, waits)
        except BaseException:
            drop_all(slot, tuple(edits))
            raise
        streams = frozenset(stream for path, stream in self._streams.items() if self._sites[path] in edits)
        streams |= {stream for stream, paths in self._shared_paths.items() if not paths.isdisjoint(adapter.sites)}
        has_extents = any(isinstance(edit, Intervention) for edit in edits.values())
        given = acts_of(adapter.sites)
        acts = next((each.acts for each in self._installed.values() if each.acts == given), given)  # compared by object
        self._installed[slot] = Installed(slot, tuple(edits), streams, adapter.max_rank, has_extents, acts)

    def remove(self, slot: int) -> None:
        """Empty a slot. Routes end here."""
        self._forget_routes()
        self._layout.forget(slot)
        installed = self._installed.pop(slot)
        drop_all(slot, installed.sites)

    def route(
        self, stream: Stream, runs: Iterable[tuple[int, int]], extents: Callable[[], Iterable[Extent]] = tuple
    ) -> None:
        """From now on the stream's tokens are `runs`, in their order: (slot, number of tokens), 0 = base.

        Neighbouring runs of one slot, a run for each row for example, count as one. A slot may have several.
        `extents` is called when an adapter among them asks where its tokens stand; without any, none of them stands
        in a sequence, as those of a soft prompt.
        """
        division = divided(runs)
        for slot in {slot for slot, _ in division if slot != BASE_SLOT}:
            self.installed(slot)
        lane = self._lanes[stream]
        for site in self._shared[stream]:
            site.lane = lane
        adapted = {s for s, _ in division if s != BASE_SLOT and stream in self._installed[s].streams}
        if not adapted:
            lane.route = None
            return
        others = [r.active for r in (x.route for x in self._lanes.values() if x is not lane) if r is not None]
        self._make_hot(adapted.union(*others))
        asking = {slot for slot in adapted if self._installed[slot].has_extents}
        found = tuple(extent for extent in extents() if extent.slot in asking) if asking else ()
        lane.enter(division, adapted, self._layout.places, self._device, found, num_slots=self.num_slots)

    def share(self, path: str, stream: Stream) -> Callable[[Stream], None]:
        """Have a site serve the tokens of another stream too; what is given says whose tokens come next."""
        site = self._sites[path]
        self._shared_paths.setdefault(stream, set()).add(path)

        def follow(stream: Stream) -> None:
            site.lane = self._lanes[stream]

        return follow

    def clear(self) -> None:
        """No routes: the model is the plain base."""
        for lane in self._lanes.values():
            lane.route = None

    def check(self) -> None:
        """Our own books: the layout is sound and its adapters are installed."""
        self._layout.check()
        for slot, place in self._layout.places.items():
            assert place.last - place.first == width_of(self._installed[slot].max_rank), slot

    def _make_hot(self, slots: set[int]) -> None:
        """Have the rows of these adapters in the stacks; places may move, and routes with them."""
        widths = {s: width_of(self._installed[s].max_rank) for s in slots if self._installed[s].max_rank}
        moves = self._layout.use(widths)
        try:
            self._write_hot(moves)
        except BaseException:  # memory, as a rule: rows that were not written must not be taken for written
            self._layout.forget_all()
            self._forget_routes()
            raise
        if moves.moved:
            for lane in self._lanes.values():
                lane.move(self._layout.places)

    def _write_hot(self, moves: Moves) -> None:
        with torch.inference_mode():
            for delta in self._deltas:
                if moves.resized:
                    delta.reset()
                for slot in moves.slots:
                    delta.write(slot, self._layout.places[slot], self._layout.capacity)

    def _forget_routes(self) -> None:
        self._acting, self._manner = (None, frozenset()), (None, None)
        self._manners.forget()
        for lane in self._lanes.values():
            lane.forget()

    def _accepted(self, slot: int, adapter: Adapter) -> dict[Site, Edit]:
        if slot == BASE_SLOT or slot in self._installed:
            raise ValueError(f"slot {slot} is taken; remove its adapter first")
        if adapter not in self._vetted:
            self.vet(adapter)
        return {self._sites[path]: edit for path, edit in adapter.sites.items()}
