"""Parts of a pipeline beside streamed transformers: one at a time is on the device."""

import torch
from torch import nn

from wanlora.wan.pipeline import take_turns_beside

DEVICE = torch.device("meta")


class Part(nn.Module):
    """Records the device that it is moved to."""

    where = "cpu"

    def to(self, device):
        self.where = torch.device(device).type
        return self

    def parameters(self):
        yield torch.empty(0, device=self.where)

    def forward(self) -> None:
        assert self.where == "meta"


def test_one_part_at_a_time_is_on_the_device_in_every_order_of_a_pipeline():
    names = ("text_encoder", "image_encoder", "vae")
    parts = {name: Part() for name in names}
    transformer = nn.Identity()
    take_turns_beside([transformer], parts.values(), DEVICE)

    def on_device():
        return [name for name, part in parts.items() if part.where == "meta"]

    for _ in range(2):  # a second video begins while the VAE of the first is on the device
        for name in names:
            parts[name]()
            assert on_device() == [name]
        transformer(torch.zeros(1))
        assert on_device() == []
        parts["vae"]()
        assert on_device() == ["vae"]
