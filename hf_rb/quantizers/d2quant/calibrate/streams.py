"""The hidden states of the calibration text in the original model, and in the one whose earlier layers are
quantized.
"""

from torch import Tensor

from hf_rb.quantizers.d2quant.calibrate.block import Block, Decoder


__all__ = ["Streams"]


class Streams:
    """
    Two streams of hidden states, on the CPU and in the model's type.

    Args:
        decoder ([`Decoder`]):
            The model.
        tokens (`torch.Tensor`):
            Calibration text `(sequences, length)`.
        batch_size (`int`):
            Sequences that run together.

    Attributes:
        original (`list[torch.Tensor]`): What the next layer reads in the original model, by batch,
            `(batch, length, hidden)`.
        quantized (`list[torch.Tensor]`): The same where everything before it is quantized.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, batch_size: int):
        self.original = [decoder.enter(ids).cpu() for ids in tokens.split(batch_size)]
        self.quantized = list(self.original)
        self._dtype = self.original[0].dtype

    def observe(self, block: Block, keep: bool) -> dict[tuple[str, ...], list[Tensor]]:
        """
        Runs the original layer on the original stream, which then is what the next layer reads.

        Args:
            block ([`Block`]):
                The layer.
            keep (`bool`):
                Whether what the linear layers read is returned too.

        Returns:
            `dict[tuple[str, ...], list[torch.Tensor]]`: By the names of the linear layers that read the same tensor,
            in the order of running, these tensors, one a batch; none without `keep`.
        """
        readings: dict[tuple[str, ...], list[Tensor]] = {}
        for i, hidden in enumerate(self.original):
            output, inputs = block.watch(hidden)
            self.original[i] = self.keep(output, f"{block.name} of the original model")
            for names, read in inputs.items():
                kept = readings.setdefault(names, [])
                if keep:
                    kept.append(self.keep(read, f"What {names[0]} of the original model reads"))
        return readings

    def advance(self, block: Block) -> float:
        """Runs the quantized layer on the other stream; returns the relative error of what comes out."""
        lost = norm = 0.0
        for i, hidden in enumerate(self.quantized):
            self.quantized[i] = self.keep(block.run(hidden), f"{block.name}, quantized,")
            lost += (self.quantized[i].double() - self.original[i]).square().sum().item()
            norm += self.original[i].double().square().sum().item()
        return (lost / norm) ** 0.5 if norm else 0.0

    def inputs(self, block: Block, name: str) -> list[Tensor]:
        """Returns what a linear layer reads in the quantized stream, by batch."""
        return [self.keep(block.input_of(name, hidden), f"What {name} reads") for hidden in self.quantized]

    def keep(self, tensor: Tensor, what: str) -> Tensor:
        """
        Returns a tensor as the streams have it; `what` it is, an error says.

        Raises:
            ValueError: A value is not finite in the model's type.
        """
        tensor = tensor.to("cpu", self._dtype)
        if not tensor.isfinite().all():
            raise ValueError(
                f"{what} has activations that are not finite in {self._dtype}. Load the model in another type "
                "(`dtype=torch.float32`), or look for damaged weights."
            )
        return tensor
