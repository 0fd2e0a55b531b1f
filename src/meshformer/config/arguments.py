"""Which parameter of a model's `forward` takes what a task gives it. Without torch: the same for a class whose source is read and one that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# What a task calls it -> names under which models take the same.
USUAL_NAMES = {
    "positions_BT": ("positions", "position_ids", "pos", "input_pos"),
    "documents_BT": ("documents", "document_ids", "doc_ids"),
    "token_types_BT": ("token_types", "token_type_ids"),
}


def places(parameters: Mapping[str, bool], open_ended: bool, held: Sequence[str], empty: Sequence[str] = ()) -> dict[str, str]:
    """What the task gives -> the parameter that takes it.

    `parameters`: name -> whether it is required, in order, of a forward that also takes **kwargs where it is `open_ended`. `held`: what there is
    in this batch, the model's input first; `empty`: what a batch may hold and this one does not. An own name goes before a usual one, and the
    input goes to the first parameter, whatever its name. ValueError, in words that follow "the model: ", for a forward that cannot be called so:
    leaving out what a batch holds would compute something else.
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
