"""Column scales of down projections on their way into the scales of their partners, while a checkpoint is streamed.

`from_pretrained` absorbs column scales when the whole model is there (`maths/absorption.py`). A stream has one tensor
at a time, and the files say whether the down projection or its partner is first. Whichever it is, the down projection
is solved; its solution does not depend on the order, so neither does the result. [`ColumnScales`] keeps the column
scales until the other one comes. If they are lost, because a run was interrupted in between, the down projection is
read and solved again.
"""

from collections.abc import Callable, Collection, Mapping
from typing import cast

from torch import Tensor, nn

from hf_rb.quantizers.d2quant.format import scale_rows
from hf_rb.quantizers.d2quant.maths.absorption import absorbable
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.loading.matrices import Place
from hf_rb.quantizers.packed.weight import PackedWeight


__all__ = ["ColumnScales"]


class ColumnScales:
    """
    The column scales that go into the scales of other layers.

    Args:
        model (`nn.Module`):
            Model on the meta device, packed.
        layouts (`Mapping[str, Layout]`):
            Layouts of its packed parameters by their full names.
        solve (`Callable[[Layout, torch.Tensor], PackedWeight]`):
            Quantizes a matrix.

    Attributes:
        known (`dict[tuple[str, int | None], torch.Tensor]`): Column scales by the name of the down projection and the
            expert.
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: Mapping[str, Layout],
        solve: Callable[[Layout, Tensor], PackedWeight],
    ):
        self._layouts, self._solve = layouts, solve
        self._pairs = {
            pair.up: pair for pair in absorbable(model)
        }  # names are those of layers, or of parameters of fused experts
        self.known: dict[tuple[str, int | None], Tensor] = {}

    @property
    def absorbed(self) -> Collection[str]:
        """The down projections whose column scales go elsewhere."""
        return {pair.down for pair in self._pairs.values()}

    def take(self, name: str, column: Tensor, place: Place) -> None:
        """Keeps the column scales of a down projection for its partner."""
        self.known[name, place.expert] = column

    def has_partner(self, name: str) -> bool:
        """Returns whether a layer gets the column scales of a down projection."""
        return name in self._pairs

    def put_into(self, name: str, layout: Layout, scale: Tensor, rows: int, place: Place) -> None:
        """
        Multiplies the scales of a partner, or of the part of it that a file has in one tensor, with column scales.

        Args:
            name (`str`):
                The partner.
            layout ([`~hf_rb.quantizers.kernels.layout.Layout`]):
                Its layout.
            scale (`torch.Tensor`):
                float16 `(rows here, groups, scales)`, in the form of memory; changed in place.
            rows (`int`):
                Rows of the whole partner.
            place ([`~hf_rb.quantizers.loading.matrices.Place`]):
                Which of them are here.

        Raises:
            ValueError: A product is too large or too small for float16.
        """
        pair = self._pairs[name]
        meant = range(*pair.rows.indices(rows))  # of a joined gate and up the rows of up
        here = [row - place.first for row in meant if place.first <= row < place.first + len(scale)]
        if not here:
            return
        try:
            scale[here] = scale_rows(layout, scale[here], self._column(pair.down, place))
        except ValueError as error:
            raise ValueError(
                f"{error} Quantize without `stream=True` (`--stream`): then column scales stay with {pair.down}."
            ) from error

    def scale_bias(self, name: str, bias: Tensor, place: Place) -> Tensor:
        """Returns the bias of a partner times the column scales."""
        return (bias * self._column(self._pairs[name].down, place)).to(bias.dtype)

    def _column(self, down: str, place: Place) -> Tensor:
        """Returns the column scales of a down projection, or of that of one expert."""
        if (down, place.expert) not in self.known:
            parameter = down if down in self._layouts else f"{down}.weight"
            column = self._solve(self._layouts[parameter], place.read(parameter)).column
            self.known[down, place.expert] = cast(Tensor, column)  # it is dual
        return self.known[down, place.expert]
