"""Match what a task passes to a model with the parameters of its `forward`. Without torch, so that it also works on a class that is only parsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Name used by our tasks -> names that other models use for the same input.
USUAL_NAMES = {
    "positions_BT": ("positions", "position_ids", "pos", "input_pos"),
    "documents_BT": ("documents", "document_ids", "doc_ids"),
    "token_types_BT": ("token_types", "token_type_ids"),
}


def places(parameters: Mapping[str, bool], open_ended: bool, held: Sequence[str], empty: Sequence[str] = ()) -> dict[str, str]:
    """Return a mapping from each input that the task passes to the parameter that takes it.

    `parameters` maps the names of forward's parameters, in order, to whether they are required; `open_ended`: forward also takes **kwargs. `held`
    lists the inputs in this batch, the model's main input first; `empty` those that other batches may have. An exact name wins over one of
    USUAL_NAMES, and the main input goes to the first free parameter, whatever its name. Raises ValueError (its text follows "the model: ") if an
    input finds no parameter, since leaving it out would change the result, or a required parameter no input.
    """
    first, *_ = held
    found = {name: name for name in (*held, *empty) if name in parameters}
    if first not in found and (free := next((one for one in parameters if one not in found), None)) is not None:
        found[first] = free
    for name in (*held, *empty):
        usual = [one for one in USUAL_NAMES.get(name, ()) if one in parameters and one not in found.values()]
        if name not in found and usual:
            found[name] = usual[0]
        elif name not in found and open_ended:
            found[name] = name
    takes = f"its forward takes {', '.join(parameters) or 'nothing by name'}"
    for name in held:
        if name not in found:
            names = " or ".join((name, *USUAL_NAMES.get(name, ()))) if name != first else "its first parameter"
            raise ValueError(f"{takes}, and the batches hold {name.rpartition('_')[0] or name}, which would go to {names}")
    lacking = [one for one, required in parameters.items() if required and one not in found.values()]
    if lacking:
        raise ValueError(f"{takes}, and nothing of a batch goes to {', '.join(lacking)}")
    return found
