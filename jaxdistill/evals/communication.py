"""What a training step sends between devices, by the layout of its mesh."""

from __future__ import annotations

from jaxdistill.evals.cost import count_params, matrix_params
from jaxdistill.mesh import MeshShape
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Remat
from jaxdistill.models.sharding import Layout


def sent_bytes(
    student: ModelConfig,
    mesh: MeshShape,
    *,
    tokens: int,
    micro_batches: int = 1,
    teacher: ModelConfig | None = None,
    teacher_layout: Layout = "sharded",
    frozen: str | None = None,
    remat: Remat = "full",
    itemsize: int = 2,
) -> dict[str, float]:
    """Return the bytes that one device sends in a step over each mesh axis.

    Ring collectives over n devices send ``(n - 1) / n`` of what they gather or reduce-scatter, and
    twice that of what they all-reduce (Rajbhandari et al., ZeRO, arXiv 1910.02054):

    - ``fsdp``: in each micro-batch the student's weights are gathered forward and backward and its
      float32 gradients reduce-scattered; a sharded teacher's weights are gathered once.
    - ``data``: the float32 gradients are all-reduced.
    - ``tensor``: activations are all-reduced twice a layer forward, twice backward (Shoeybi et al.,
      Megatron-LM, arXiv 1909.08053), twice more where remat makes layers again, and twice by the
      teacher.

    Args:
        student: its shape.
        mesh: devices along each axis.
        tokens: of a step, over all devices.
        micro_batches: of a step.
        teacher: a live teacher's shape.
        teacher_layout: how its weights are divided.
        frozen: regex over paths that have no gradients.
        remat: of the student.
        itemsize: bytes of a number of weights and activations as products read them.
    """

    def ring(n: int) -> float:
        return (n - 1) / n

    weights = count_params(student)
    trained = weights - (0 if frozen is None else matrix_params(student, frozen))
    part = micro_batches / mesh.tensor
    gathered = 2 * itemsize * weights + 4 * trained
    if teacher is not None and teacher_layout == "sharded":
        gathered += itemsize * count_params(teacher)
    rows = tokens / (mesh.data * mesh.fsdp)
    passes = {"none": 4, "minimal": 4, "full": 6}[remat]
    moved = passes * student.num_layers * student.hidden_size
    if teacher is not None and teacher_layout != "replicated":
        moved += 2 * teacher.num_layers * teacher.hidden_size
    return {
        "fsdp": ring(mesh.fsdp) * part * gathered,
        "data": 2 * ring(mesh.data) * part * 4 * trained / mesh.fsdp,
        "tensor": 2 * ring(mesh.tensor) * rows * moved * itemsize,
    }
