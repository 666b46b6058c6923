"""What a loss that is computed outside of the model takes between forward and backward, as far as it can be told.

A plan sees no further than the model's outputs. A loss on them keeps something for its own backward, and makes the
gradient where the model's backward starts: cross entropy keeps the logarithms of probabilities, and when the gradient
of its input is made, theirs is still there. That is three times the bytes of the outputs, beside these (if the user
still holds them) and all that the model saved. Other losses take less.
"""

from __future__ import annotations

from fxckpt.core.simulate import Timeline

_TIMES = 3
_WORTH_A_WORD = 1 / 20


def loss_bytes(timeline: Timeline) -> int:
    """What a loss such as cross entropy takes for the outputs that backward starts from [B].

    Zero where that is nothing against the peak, as for models that return a loss, or some numbers an example.
    """
    graph = timeline.graph
    outputs_bytes = sum(s.size_bytes for s in graph.storages if s.kind == "tangent")
    return _TIMES * outputs_bytes if outputs_bytes > _WORTH_A_WORD * timeline.peak_bytes else 0


def between_bytes(timeline: Timeline) -> int:
    """What is in use between forward and backward with such a loss [B]."""
    graph = timeline.graph
    return graph.static_bytes + graph.own_outputs_bytes + timeline.saved_bytes + loss_bytes(timeline)
