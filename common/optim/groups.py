"""Parameter groups: which weights decay, and which learn faster."""

from collections.abc import Iterable

from torch import nn

from common import limits


def weight_decay_groups(module: nn.Module, *, weight_decay: float, no_decay: Iterable[str] = ()) -> list[dict]:
    """Two groups for a torch optimiser: matrices and filters with `weight_decay`, the rest with none.

    No decay for biases, gains and normalisation parameters (fewer than 2 axes) and for every parameter whose name
    contains one of `no_decay`. Frozen parameters are left out, a shared parameter appears once, empty groups are
    dropped.
    Raises UserError for a negative weight_decay.
    """
    limits.number("weight_decay", weight_decay, least=0, hint="Set weight_decay=0 to switch it off.")
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.dim() < 2 or any(part in name for part in no_decay)
            (plain if free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def bias_and_norm_groups(
    module: nn.Module, *, lr: float, bias_lr: float = 1.0, decay_norms: bool = False, decay_biases: bool = False
) -> list[dict]:
    """Groups for a torch optimiser that treat normalisations, scalars and biases apart from the other weights.

    lr            learning rate of the optimiser
    bias_lr       biases learn with `bias_lr` times that; the published HamNet has 2
    decay_norms   False: gains and biases of normalisations, and parameters of one element, do not decay
    decay_biases  False: the other biases do not decay

    The weight decay itself is the optimiser's. Frozen parameters are left out, a shared parameter appears once, empty
    groups are dropped. Raises UserError for a bias_lr that is not positive.
    """
    limits.number("bias_lr", bias_lr, above=0, hint="Set bias_lr=1 for the learning rate of the rest.")
    norms = {id(p) for part in module.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)}
    found: dict[tuple[bool, bool], list] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        bias = name.rpartition(".")[2].endswith("bias")
        if id(parameter) in norms or parameter.numel() == 1:
            decays = decay_norms
        else:
            decays = decay_biases if bias else True
        found.setdefault((decays, bias and bias_lr != 1), []).append(parameter)
    groups = []
    for (decays, faster), parameters in sorted(found.items(), key=lambda item: (not item[0][0], item[0][1])):
        options = {} if decays else {"weight_decay": 0.0}
        groups.append({"params": parameters, **options, **({"lr": bias_lr * lr} if faster else {})})
    return groups


def matrix_groups(module: nn.Module) -> list[dict]:
    """Two groups for `common.optim.muon.Muon`: the matrices of linear layers (`matrix` True), and everything else.

    A matrix is a parameter `weight` of two axes, unless its layer looks rows up (nn.Embedding): learned tokens, tables,
    filters, gains and biases are none. Other optimisers take the groups as well and ignore the mark. Frozen parameters
    are left out, a shared parameter appears once, empty groups are dropped.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    found: dict[bool, list] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            named = name.rpartition(".")[2] == "weight"
            found[named and parameter.dim() == 2 and id(parameter) not in tables].append(parameter)
    return [{"params": parameters, "matrix": matrix} for matrix, parameters in found.items() if parameters]
