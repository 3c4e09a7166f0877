"""A CLIP tower for llama.cpp's llava graph, which puts CLS behind the patches and then takes rows 1 to N.

That graph (tools/mtmd/models/llava.cpp, since May 2025) reads the rows [patch 0, ..., patch N-1, CLS], and gives rows
1 to N to the projector: it loses patch 0 and takes CLS for a patch. Attention does not depend on the order of rows, so
positions in the graph's order make the tower itself right. Layers behind it then copy each row into the next one, by
attention with one-hot weights, and rows 1 to N hold the patches in order.

A row is wider than the tower's, by what these layers need: a code of the row, one of the row before, the mean, and a
large constant. With the mean apart, the other columns have mean 0, so norms over the wider row are those of the tower.
The constant makes the norms of the last layers a division by it. Features differ by less than 0.2 %.
"""

import math
from collections.abc import Iterator

import torch

LARGE = 80.0  # the constant, times the square root of the width
MEAN = 1 / 16  # the mean's scale
CODE = 0.005  # the norm of a code: small in the norms of the tower, also where a row of flat color makes it larger
SHARPNESS = 2000.0  # of the attention that copies; a row of large features has a small code


class WideTower:
    """Tensors under llama.cpp's names, from those of a CLIP tower under the same names.

    tensors: v.class_embd, v.patch_embd.weight, v.position_embd.weight, v.pre_ln.*, and the layers v.blk.* in use.
    heads: of the tower.
    Raises ValueError for a tower with one head, which cannot copy a row and remove the old one at once. So it does for
    one with more rows than a head has columns: only orthogonal codes distinguish rows of any size."""

    def __init__(self, tensors: dict[str, torch.Tensor], heads: int):
        self.tensors = {name: value.detach().double() for name, value in tensors.items()}
        self.heads = heads
        self.rows, self.width = self.tensors["v.position_embd.weight"].shape
        self.head_width, self.code = self.width // heads, self.rows
        if heads < 2 or self.rows > self.head_width:
            limit = "two attention heads, and heads at least as wide as the patches and CLS are many"
            found = f"{self.rows} rows, {heads} heads of {self.head_width}"
            raise ValueError(f"llama.cpp needs a tower with {limit}: {found}")
        self.wide = math.ceil((self.width + 2 * self.code + 5) / heads) * heads
        self.wide_head = self.wide // heads
        self.mean, self.large = self.width + 2 * self.code, self.width + 2 * self.code + 2  # first of two columns each
        self.center = torch.eye(self.width, dtype=torch.double) - 1 / self.width
        self.constant = LARGE * math.sqrt(self.width)
        self.hidden = max(2 * self.width, self.tensors["v.blk.0.ffn_up.weight"].shape[0])

    def convert(self) -> dict[str, torch.Tensor]:
        layers = 1 + max(int(name.split(".")[2]) for name in self.tensors if name.startswith("v.blk."))
        own = (self._layer(number, number == layers - 1) for number in range(layers))
        out = self._embeddings()
        for number, block in enumerate([self._first(), *own, *self._copies()]):
            out |= {f"v.blk.{number}.{name}": value for name, value in block.items()}
        return {name: value.float() for name, value in out.items()}

    def projector(self, weight: torch.Tensor) -> torch.Tensor:
        """The first matrix of the projector (out, width) on wide rows: the mean has a column of its own."""
        wide = weight.new_zeros(len(weight), self.wide)
        wide[:, : self.width] = weight
        wide[:, self.mean] = weight.sum(1) / MEAN
        return wide

    def _embeddings(self) -> dict[str, torch.Tensor]:
        position = self.tensors["v.position_embd.weight"].roll(-1, 0)
        patch, cls = self.tensors["v.patch_embd.weight"], self.tensors["v.class_embd"]
        # pre_ln divides a row, and its codes, by the row's deviation: CLS's is known, a patch's is about that of noise.
        noise = torch.randn(64, patch[0].numel(), generator=torch.Generator().manual_seed(0)).double()
        deviations = torch.full((self.rows, 1), (noise @ patch.flatten(1).T + position[0]).std(1).mean().item())
        deviations[-1] = (cls + position[-1]).std().item()
        # Of each row, (rows, rows): orthogonal but for their mean, which is taken out.
        codes = torch.eye(self.rows, dtype=torch.double) - 1 / self.rows
        codes /= codes.norm(dim=1, keepdim=True)
        wide = position.new_zeros(self.rows, self.wide)
        wide[:, : self.width] = position @ self.center
        both = torch.cat([codes, codes.roll(1, 0)], dim=1)  # and of the row before
        wide[:, self.width : self.mean] = both * CODE * deviations.double()
        out = self._norm("v.pre_ln", torch.ones(self.width), torch.zeros(self.width)) | {"v.position_embd.weight": wide}
        out["v.pre_ln.weight"][self.width : self.mean] = 1.0
        for name, value in (("v.class_embd", cls), ("v.patch_embd.weight", patch)):
            out[name] = value.new_zeros(self.wide, *value.shape[1:])
            out[name][: self.width] = torch.tensordot(self.center, value, dims=1)
        return out

    def _norm(self, name: str, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tower's norm on the first columns, and zeros on the others."""
        zeros = torch.zeros(self.wide - self.width, dtype=torch.double)
        weight = weight.double() * math.sqrt(self.width / self.wide)
        return {f"{name}.weight": torch.cat([weight, zeros]), f"{name}.bias": torch.cat([bias.double(), zeros])}

    def _out(self, matrix: torch.Tensor) -> torch.Tensor:
        """What is added to a row, (width, n) or (width,): without its mean, which goes to its own two columns."""
        out = matrix.new_zeros(self.wide, *matrix.shape[1:])
        out[: self.width] = self.center @ matrix
        out[self.mean] = MEAN * matrix.mean(0)
        out[self.mean + 1] = -out[self.mean]
        return out

    def _nothing(self) -> dict[str, torch.Tensor]:
        """A block that adds nothing."""
        sizes: dict[str, tuple[int, ...]] = {f"attn_{part}": (self.wide,) * 2 for part in ("q", "k", "v", "out")}
        sizes |= {"ln1": (self.wide,), "ln2": (self.wide,)}
        sizes |= {"ffn_up": (self.hidden, self.wide), "ffn_down": (self.wide, self.hidden)}
        weights = {f"{name}.weight": torch.zeros(size, dtype=torch.double) for name, size in sizes.items()}
        return weights | {f"{name}.bias": torch.zeros(size[0], dtype=torch.double) for name, size in sizes.items()}

    def _first(self) -> dict[str, torch.Tensor]:
        """The affine part of pre_ln, whose mean is not 0: x -> w x + b - x is added, as gelu(x) - gelu(-x) = x."""
        block = self._nothing() | self._norm("ln2", torch.ones(self.width), torch.zeros(self.width))
        columns = torch.arange(self.width)
        block["ffn_up.weight"][columns, columns] = 1.0
        block["ffn_up.weight"][self.width + columns, columns] = -1.0
        linear = self._out(torch.diag(self.tensors["v.pre_ln.weight"]))
        linear[columns, columns] -= 1.0
        block["ffn_down.weight"][:, : 2 * self.width] = torch.cat([linear, -linear], dim=1)
        return block | {"ffn_down.bias": self._out(self.tensors["v.pre_ln.bias"])}

    def _layer(self, number: int, is_last: bool) -> dict[str, torch.Tensor]:
        block = self._nothing()
        prefix = f"v.blk.{number}."
        old = {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}
        for name in ("ln1", "ln2"):
            block |= self._norm(name, old[f"{name}.weight"], old[f"{name}.bias"])
        # A head's columns are the first of a wider head's.
        places = torch.cat([torch.arange(self.head_width) + head * self.wide_head for head in range(self.heads)])
        for part in "qkv":
            scale = math.sqrt(self.wide_head / self.head_width) if part == "q" else 1.0
            block[f"attn_{part}.weight"][places, : self.width] = old[f"attn_{part}.weight"] * scale
            block[f"attn_{part}.bias"][places] = old[f"attn_{part}.bias"] * scale
        block["attn_out.weight"][:, places] = self._out(old["attn_out.weight"])
        block |= {f"{name}.bias": self._out(old[f"{name}.bias"]) for name in ("attn_out", "ffn_down")}
        inner = len(old["ffn_up.weight"])
        block["ffn_up.weight"][:inner, : self.width] = old["ffn_up.weight"]
        block["ffn_up.bias"][:inner] = old["ffn_up.bias"]
        block["ffn_down.weight"][:, :inner] = self._out(old["ffn_down.weight"])
        if is_last:
            block["ffn_down.bias"][self.large : self.large + 2] = torch.tensor([self.constant, -self.constant])
        return block

    def _copies(self) -> Iterator[dict[str, torch.Tensor]]:
        """Layers whose first heads add the row before, and whose other heads take the row itself away."""
        columns, balance = [*range(self.width), self.mean, self.mean + 1], self.large + 2
        room = self.heads // 2 * self.wide_head
        for start in range(0, len(columns), room):
            some, block = columns[start : start + room], self._nothing()
            # The norm divides by the constant's share: this takes it back.
            block["ln1.weight"][columns] = self.constant * math.sqrt(2 / self.wide)
            block["ln1.weight"][self.width : self.mean] = self.constant * math.sqrt(2 / self.wide) / CODE
            rows, scale = torch.arange(self.code), math.sqrt(SHARPNESS * math.sqrt(self.wide_head))
            for head in range(self.heads):
                first, copies = head * self.wide_head, head < self.heads // 2
                asked = self.width + (self.code if copies else 0)  # the code of the row before, or the row's own
                block["attn_q.weight"][first + rows, asked + rows] = scale
                block["attn_k.weight"][first + rows, self.width + rows] = scale
                group = first if copies else first - room
                for place, column in enumerate(some[group : group + self.wide_head]):
                    block["attn_v.weight"][first + place, column] = 1.0
                    block["attn_out.weight"][column, first + place] = 1.0 if copies else -1.0
            # Half a row of another mean: one more column keeps the sum of a row at 0, for the next norm.
            block["attn_out.weight"][balance] = -block["attn_out.weight"].sum(0)
            yield block
