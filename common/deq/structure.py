"""A state of any shape as one matrix: rows are samples, columns everything else."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.errors import UserError

State = Tensor | tuple | list | dict  # nested tuples, lists and dicts of tensors with the same leading dimension B


@dataclass(frozen=True)
class Layout:
    """How a structured state becomes a matrix (B, D) and back.

    Leaves are flattened and put side by side; half-precision leaves travel as float32, since a fixed-point residual in
    half precision ends near 4e-3. A leaf of shape (B,) is one column; a tensor without dimensions is one sample.
    """

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]  # without the batch dimension
    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]
    scalar: bool  # the state is one tensor without dimensions
    dtype: torch.dtype  # of the matrix

    @classmethod
    def of(cls, z: State) -> "Layout":
        """Layout of a state. Raises UserError when it holds no tensors or leaves of different batch size."""
        leaves, spec = pytree.tree_flatten(z)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            found = ", ".join(str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves)
            raise UserError(
                f"z0 must be a floating-point tensor or a nested tuple, list or dict of them, got {found or 'nothing'}."
            )
        scalar = len(leaves) == 1 and leaves[0].dim() == 0
        if not scalar and (any(leaf.dim() == 0 for leaf in leaves) or len({len(leaf) for leaf in leaves}) > 1):
            raise UserError(
                "Every tensor of z0 needs the same leading batch dimension, got shapes "
                f"{', '.join(str(tuple(leaf.shape)) for leaf in leaves)}. Give each the shape (B, ...)."
            )
        shapes = tuple(leaf.shape[1:] for leaf in leaves)
        dtype = leaves[0].dtype
        for leaf in leaves[1:]:
            dtype = torch.promote_types(dtype, leaf.dtype)
        return cls(
            spec=spec,
            shapes=shapes,
            dtypes=tuple(leaf.dtype for leaf in leaves),
            widths=tuple(shape.numel() for shape in shapes),
            scalar=scalar,
            dtype=torch.float32 if dtype.itemsize < 4 else dtype,
        )

    def pack(self, z: State) -> Tensor:
        """The state as (B, D); one contiguous tensor of the right type is not copied."""
        leaves = pytree.tree_leaves(z)
        if len(leaves) == 1:
            leaf = leaves[0]
            flat = leaf.reshape(1, 1) if self.scalar else leaf.reshape(len(leaf), self.widths[0])
            return flat.to(self.dtype)
        flat = [leaf.reshape(len(leaf), width).to(self.dtype) for leaf, width in zip(leaves, self.widths, strict=True)]
        return torch.cat(flat, dim=1)

    def unpack(self, flat: Tensor) -> State:
        """(B', D) as the structure again, for any number of rows; views where the types allow."""
        if self.scalar:
            return pytree.tree_unflatten([flat.reshape(()).to(self.dtypes[0])], self.spec)
        parts = flat.split(self.widths, dim=1) if len(self.widths) > 1 else (flat,)
        leaves = [
            part.reshape(len(flat), *shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.spec)

    def pack_image(self, image: State, rows: int) -> Tensor:
        """What the map returned for `rows` samples, as (rows, D).

        Raises UserError when it is not of the structure and the shapes of the state.
        """
        if isinstance(image, Tensor) and len(self.shapes) == 1 and self.spec.is_leaf():
            leaves = [image]
        else:
            if image is None:
                raise UserError("fn returned None. Return the next state, with the structure and shapes of z0.")
            try:
                leaves = self.spec.flatten_up_to(image)  # the keys of a dict may come in any order
            except ValueError:
                leaves = []
            if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
                structure = _outline(pytree.tree_unflatten([torch.empty(0)] * len(self.shapes), self.spec))
                raise UserError(f"fn returned {_outline(image)}, but z0 is {structure}. Return the structure of z0.")
        for number, (leaf, shape) in enumerate(zip(leaves, self.shapes, strict=True)):
            expected = torch.Size() if self.scalar else torch.Size((rows, *shape))
            if leaf.shape != expected:
                where = "" if len(leaves) == 1 else f" in tensor {number} of the state"
                raise UserError(
                    f"fn changed the shape of the state{where}: {tuple(expected)} became {tuple(leaf.shape)}. A fixed "
                    f"point needs a map onto the same shape."
                )
        return self.pack(leaves)


def _outline(value) -> str:
    """Such as `(tensor, {a: tensor})`."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_outline(part)}' for key, part in value.items())}}}"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_outline, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return type(value).__name__


def take_rows(tree, rows: Tensor):
    """Every tensor of a structure at the rows (n,) of its leading dimension; what is no tensor passes through."""
    return pytree.tree_map(lambda leaf: leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf, tree)


def without_autocast(device: str):
    """Context in which everything runs in the types of its inputs; for device types without autocast too."""
    # torch.compile of torch 2.11 cannot look the question up; every device it compiles for has autocast
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()
