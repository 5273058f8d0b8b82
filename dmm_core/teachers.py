"""N teachers, one after the other, on ONE device (the authors' script needs a GPU for each)."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmm_core.checkpoint import Checkpoint
from dmm_core.conditioning import Context, encode_prompts
from dmm_core.diffusion import to_epsilon, zero_snr_times
from dmm_core.economy import STREAMS, let_go
from dmm_core.extension import StyleTeacher
from dmm_core.models import build_text_encoders, build_unet
from dmm_core.residency import HostStore, Slot, host_store
from dmm_core.speed import quicken, to_device
from dmm_core.streaming import Streamed, passes_over
from dmm_core.student import TIME_BIAS

ALL_STAY = ("cpu",)  # kinds of device with the host's own memory, where teachers that wait take no room from the work


class Teachers:
    """The teachers' UNets, at most ``resident`` of them on the device; their prompt embeddings stay on the CPU.

    With fewer places than teachers, the weights of the least recently used one are overwritten in place by those of the
    next, which ``expect`` lets begin while the present one still works.

    Args:
        checkpoints: one a teacher, all of one architecture.
        resident: how many UNets may be on the device at once; None keeps all, 0 none: their blocks pass over it one
            after the other (``STREAMS``; elsewhere as 1).
        channels_last, compiled: see ``speed.quicken``.
        prediction_type: the student's, which ``predict`` converts to; None: the first teacher's.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        resident: int | None = None,
        channels_last: bool = False,
        compiled: bool = False,
        prediction_type: str | None = None,
    ) -> None:
        self.checkpoints = list(checkpoints)
        self.device, self.dtype = torch.device(device), dtype
        self.resident = len(self.checkpoints) if resident is None else max(resident, self.least)
        self.channels_last, self.compiled = channels_last, compiled
        self.prediction_type = prediction_type or self.checkpoints[0].prediction_type
        self.loads = 0
        self._unets: OrderedDict[int, Slot] = OrderedDict()
        self._store: HostStore | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._next: deque[int] = deque()
        self._pool: Any = None
        self._embeddings: dict[int, Context] = {}

    @property
    def least(self) -> int:
        """How few may be on the device: none where their blocks may pass over it."""
        return int(self.device.type not in STREAMS)

    def __len__(self) -> int:
        return len(self.checkpoints)

    # ------------------------------------------------------------ residency

    @property
    def store(self) -> HostStore:
        """The teachers in the host's memory; made when it is first needed."""
        if self._store is None:
            self._store = host_store(self.checkpoints, self.device, self.dtype, self.channels_last)
        return self._store

    def unet(self, index: int) -> Any:
        """Teacher ``index``'s UNet on the device, in evaluation mode, without gradients; until another one's turn."""
        if index not in self._unets:
            self._bring(index)
        self._unets.move_to_end(index)
        return self._unets[index].take()

    def unet_alone(self, index: int) -> Any:
        """As ``unet``, with no other teacher on a GPU beside it; the others come back when they are asked."""
        places = self.resident
        if self.device.type in ALL_STAY or not places or (index in self._unets and len(self._unets) == 1):
            return self.unet(index)
        if places >= len(self):  # their weights come from the files, in modules of their own
            for other in [i for i in self._unets if i != index and not self._share(i, index)]:
                del self._unets[other]
        else:  # the weights of the one that stays are overwritten
            self.keep(1, self._pool is not None)
        let_go(self.device)
        try:
            return self.unet(index)
        finally:
            self.resident = places

    def _share(self, one: int, other: int) -> bool:
        """Whether two teachers are styles of one file, which have all but the style in common."""
        a, b = self.checkpoints[one], self.checkpoints[other]
        return isinstance(a, StyleTeacher) and isinstance(b, StyleTeacher) and a.path == b.path

    def _bring(self, index: int) -> None:
        """Begin to bring a teacher to the device, in the place of the least recently used one if all are taken."""
        self.loads += 1
        checkpoint = self.checkpoints[index]
        stay = self.resident >= len(self)  # then the file's tensors are needed only once
        tensors = checkpoint.unet() if stay else self.store.tensors(checkpoint)
        if len(self._unets) >= max(1, self.resident):
            slot = self._unets.popitem(last=False)[1]
            slot.fill(tensors)
        elif not self.resident:
            slot = self._streamed(checkpoint, tensors)
        else:
            there = self._shared(checkpoint) if stay else {}
            copies = {k: there.get(k, v).to(self.device, self.dtype, copy=not stay) for k, v in tensors.items()}
            unet = build_unet(checkpoint.unet_config, copies, self.dtype, checkpoint.path, styled=False)
            quicken(unet, self.channels_last, self.compiled)
            slot = Slot(unet, {} if stay else tensors, self._stream)
        self._unets[index] = slot

    def _streamed(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Streamed:
        """Not compiled: a compiled block would have the coming of its weights compiled too."""
        copies = {
            k: torch.empty_like(v, device="meta") if passes_over(k) else v.to(self.device, self.dtype, copy=True)
            for k, v in tensors.items()
        }
        unet = build_unet(checkpoint.unet_config, copies, self.dtype, checkpoint.path, styled=False)
        return Streamed(quicken(unet, self.channels_last, compiled=False), tensors, self._stream, self.device)

    def _shared(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """What the device has of a teacher that is another style of a file that is there: all but the style."""
        for index, slot in self._unets.items():
            if isinstance(checkpoint, StyleTeacher) and self.checkpoints[index].path == checkpoint.path:
                return {key: tensor for key, tensor in slot.targets.items() if key != TIME_BIAS}
        return {}

    def expect(self, order: Iterable[int]) -> None:
        """Which teachers will be asked to ``predict``, in this order: each is on its way while the one before works."""
        self._next = deque(order)

    def keep(self, resident: int, record: bool = False) -> None:
        """Change how many may be on the device (0: see ``resident``); the least recently used ones go.

        Args:
            record: whether ``predict`` records and replays a UNet's kernels, for which it keeps memory.
        """
        resident = max(resident, self.least)
        if bool(resident) != bool(self.resident):
            self._unets.clear()
        self.resident = resident
        self._pool = torch.cuda.graph_pool_handle() if record and resident else None
        for slot in self._unets.values():
            slot.recordings.clear()
        if resident < len(self._unets) and any(isinstance(ck, StyleTeacher) for ck in self.checkpoints):
            self._unets.clear()  # some share weights, which must not be overwritten
        while len(self._unets) > max(1, resident):
            self._unets.popitem(last=False)

    def _prefetch(self, index: int) -> None:
        """Teacher ``index`` has been asked: bring those that come after it, as many as have a place beside it."""
        if not self._next or self._next[0] != index:
            return
        self._next.popleft()
        coming = list(dict.fromkeys(other for other in self._next if other != index))
        over = bool(self._next) and self._next[0] != index  # then the only place there is may be taken, too
        for other in coming[: max(over, self.resident - 1)]:
            if other in self._unets:
                self._unets.move_to_end(other)  # it is not the one that gives way to the next
            else:
                self._bring(other)

    # ------------------------------------------------------------ prompts and predictions

    def embed(self, prompts: Sequence[str]) -> None:
        """Encode the prompts once with every teacher's own text encoder; equal encoders share the result."""
        by_encoder: dict[tuple, Context] = {}
        for index, checkpoint in enumerate(self.checkpoints):
            encoders = build_text_encoders(checkpoint, torch.float32)
            key = _fingerprint(encoders)
            if key not in by_encoder:
                by_encoder[key] = encode_prompts(encoders.to(self.device), prompts, to=("cpu", self.dtype))
            self._embeddings[index] = by_encoder[key]

    def embeddings(self, index: int, prompts: Tensor) -> Context:
        """Teacher ``index``'s embeddings of prompt numbers (B,), on the CPU; ``embed`` comes first."""
        return self._embeddings[index][prompts]

    def context(self, index: int, prompts: Tensor) -> Context:
        """The same on the device."""
        return self.embeddings(index, prompts).map(lambda part: to_device((part,), self.device)[0])

    @torch.no_grad()
    def predict(
        self, index: int, x_t: Tensor, t: Tensor, prompts: Tensor | Context, features: bool = False,
        layers: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        """Teacher ``index``'s ε (or what the student predicts) for x_t (B, 4, h, w), and maps of its UNet if wanted.

        These are its blocks' outputs, and its layers' inputs and outputs (``blockwise.LayerCalls``).
        ``prompts``: their numbers (B,) on the CPU, or their ``context``.
        """
        self.unet(index)
        slot, outputs, maps = self._unets[index], list[Tensor](), list[Tensor]()

        def ask(x_t: Tensor, t: Tensor, context: Context) -> Tensor:
            (said, *more), of_layers = slot.answer(x_t, t, context, features, layers, self._pool)
            outputs.extend(more)
            maps.extend(of_layers)
            return said

        context = prompts if isinstance(prompts, Context) else self.context(index, prompts)
        told = self.told(index, ask, x_t, t, context)
        slot.release()
        self._prefetch(index)
        return told, outputs, maps

    def told(
        self, index: int, ask: Callable[[Tensor, Tensor, Context], Tensor], x_t: Tensor, t: Tensor, context: Context
    ) -> Tensor:
        """What ``predict`` gives, of what teacher ``index``'s UNet says when it is asked: changes nothing here."""
        its = self.checkpoints[index]
        asked = zero_snr_times(t.device)[t] if its.zero_snr else t
        told = ask(x_t, asked, context).float()
        return told if self.says_the_same(index) else to_epsilon(told, x_t, t, its.prediction_type)

    def says_the_same(self, index: int) -> bool:
        """Whether teacher ``index``'s UNet predicts what the student does, ε or v."""
        return self.checkpoints[index].prediction_type == self.prediction_type

    def sampling(self, index: int) -> dict[str, Any]:
        """What ``sample_latents`` must know of a teacher."""
        its = self.checkpoints[index]
        return {"prediction_type": its.prediction_type, "zero_snr": its.zero_snr}


def _fingerprint(module: Any) -> tuple:
    """Equal for equal weights: every tensor's sum and first moment in float64, which the CPU has and MPS has not."""
    sums = [(p.double().sum().item(), p.double().square().sum().item()) for p in module.parameters()]
    return tuple(sums)
