"""A state of any structure as one matrix: each row is a sample, the columns are all its numbers."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.errors import UserError

State = Tensor | tuple | list | dict  # nested tuples, lists and dicts of tensors with the same leading dimension B


@dataclass(frozen=True)
class Layout:
    """Converts a structured state to a matrix (B, D) and back.

    Each tensor of the state is flattened to (B, width), and these are concatenated along the columns. Half-precision
    tensors become float32, because relative residuals in half precision do not fall below about 4e-3. A tensor of
    shape (B,) is one column. A tensor without dimensions is one sample.
    """

    spec: pytree.TreeSpec  # the nesting of the state
    shapes: tuple[torch.Size, ...]  # without the batch dimension
    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]
    scalar: bool  # the state is one tensor without dimensions
    dtype: torch.dtype  # of the matrix

    @classmethod
    def of(cls, z: State) -> "Layout":
        """Layout of a state. Raises UserError if it holds no tensors, or tensors of different batch sizes."""
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
        """The state as a matrix (B, D). A single contiguous tensor of the right data type is not copied."""
        leaves = pytree.tree_leaves(z)
        if len(leaves) == 1:
            leaf = leaves[0]
            flat = leaf.reshape(1, 1) if self.scalar else leaf.reshape(len(leaf), self.widths[0])
            return flat.to(self.dtype)
        flat = [leaf.reshape(len(leaf), width).to(self.dtype) for leaf, width in zip(leaves, self.widths, strict=True)]
        return torch.cat(flat, dim=1)

    def unpack(self, flat: Tensor) -> State:
        """A matrix (B', D) with any number of rows as a state; views where the data types are equal."""
        if self.scalar:
            return pytree.tree_unflatten([flat.reshape(()).to(self.dtypes[0])], self.spec)
        parts = flat.split(self.widths, dim=1) if len(self.widths) > 1 else (flat,)
        leaves = [
            part.reshape(len(flat), *shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.spec)

    def pack_image(self, image: State, rows: int) -> Tensor:
        """The image that the map returned for `rows` samples, as a matrix (rows, D).

        Raises UserError if its structure or its shapes differ from those of the state.
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
                structure = _describe(pytree.tree_unflatten([torch.empty(0)] * len(self.shapes), self.spec))
                raise UserError(f"fn returned {_describe(image)}, but z0 is {structure}. Return the structure of z0.")
        for number, (leaf, shape) in enumerate(zip(leaves, self.shapes, strict=True)):
            expected = torch.Size() if self.scalar else torch.Size((rows, *shape))
            if leaf.shape != expected:
                where = "" if len(leaves) == 1 else f" in tensor {number} of the state"
                raise UserError(
                    f"fn changed the shape of the state{where}: {tuple(expected)} became {tuple(leaf.shape)}. A fixed "
                    f"point needs a map onto the same shape."
                )
        return self.pack(leaves)


def _describe(value) -> str:
    """The structure of a value as text, such as `(tensor, {a: tensor})`."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_describe(part)}' for key, part in value.items())}}}"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_describe, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return type(value).__name__


def take_rows(tree, rows: Tensor):
    """The rows (n,) of every tensor of a structure. Values that are not tensors are returned as they are."""
    return pytree.tree_map(lambda leaf: leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf, tree)


def without_autocast(device: str):
    """Context manager that switches autocast off; it also works for device types without autocast."""
    # torch.compile of torch 2.11 cannot trace is_autocast_available. Every device it compiles for has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()
