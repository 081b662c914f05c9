"""Models in: an nn.Module, a `.pt2` or `.onnx` file, `file.py:factory` or `package.module:factory` becomes a Program.

    exported = export_module(module, (x,), "resnet")      # torch.export, with a dynamic batch where the model allows it
    program = import_exported(exported, "resnet")         # checked, free of side effects, as a Program
    import_check(program, module)                         # equal to the model on random inputs, or an EdgecError

`load_model` does all of it for any form of model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from edgec.errors import EdgecError
from edgec.importing.names import drop_assertions, drop_empty, rename_taken
from edgec.importing.quantized import QUANTIZED_SQNR_DB, comes_quantised, edgec_form
from edgec.importing.recurrent import masks_as_given, shapes_only
from edgec.importing.rewrite import rewrite
from edgec.importing.standin import StandIn
from edgec.importing.stored import prepare_stored, stored_nodes
from edgec.origin import first_line, place, source_line, user_frame
from edgec.program import MAX_BATCH, Program, is_call
from edgec.pt2 import load_pt2
from edgec.quiet import quiet
from edgec.stats import sqnr_db
from edgec.usercode import load_function, user_code

aten = torch.ops.aten

# Largest |difference| / largest |value| between a model and its Program: both run the same float32 kernels.
IMPORT_TOLERANCE = 1e-5
# Another batch size may choose another order of summation.
BATCH_TOLERANCE = 1e-4

FORMS = "give a .pt2 or .onnx file, file.py:factory or package.module:factory"
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

# Arguments that switch the randomness of an operator on; the first one that it has decides.
SWITCHES = ("train", "training", "dropout_p")
# These may return their operand itself, or a view of it, although their schemas do not say so.
SILENT_VIEWS = (
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "einsum",
    "pixel_shuffle",
    "pad",
)

TensorFunction = Callable[..., Any]


def load_model(model: Any, *, input_shape: Sequence[int] | None = None, name: str | None = None) -> Program:
    """Read a model from any of its forms.

    model: nn.Module, ExportedProgram, Program, or a string: a `.pt2` or `.onnx` path, `file.py:factory`,
        `package.module:factory`.
        A factory takes no arguments and returns an nn.Module, or a pair (nn.Module, example inputs), where the example
        inputs are a tensor, a tuple of tensors, or a dictionary of tensors by parameter of `forward`. `.pt2` and
        `.onnx` files are read without running code in them, see `edgec.pt2` and `edgec.onnx`.
    input_shape: for a module without example inputs: the shape of its one input, batch included, e.g. (1, 3, 224, 224);
        for an `.onnx` file that leaves sizes open: that of its first input.
    name: of the Program; by default that of the file, factory or class.

    The module is put in evaluation mode. The batch becomes dynamic where torch.export allows it and every input and
    output has it as dimension 0; all other dimensions are static.

    Raises EdgecError that names the file, the input, the layer or the source line.
    """
    if isinstance(model, Program):
        check_weights(model)
        return model
    if isinstance(model, (str, Path)):
        return _from_text(str(model), input_shape, name)
    if isinstance(model, torch.export.ExportedProgram):
        # Import edits graphs in place, and this one is the user's.
        exported = rename_taken(copy.deepcopy(model))
        return _checked(exported, _unguarded(exported), name or "model")
    if isinstance(model, nn.Module):
        return _from_module(model, _example(model, input_shape), name or type(model).__name__.lower())
    raise EdgecError(f"is a {type(model).__name__}", where="model", hint=f"give an nn.Module or {FORMS[5:]}")


def original_of(
    model: Any, input_shape: Sequence[int] | None = None
) -> nn.Module | torch.export.ExportedProgram | None:
    """What `load_model` reads: the module that a factory makes, or the graph of a `.pt2` file; None for Programs."""
    if isinstance(model, (nn.Module, torch.export.ExportedProgram)):
        return model
    if isinstance(model, (str, Path)):
        if Path(model).suffix == ".pt2":
            return load_pt2(Path(model))
        return _made(str(model), input_shape)[0]
    return None


def _from_text(text: str, input_shape: Sequence[int] | None, name: str | None) -> Program:
    path = Path(text)
    if path.is_dir():
        raise EdgecError("is a folder, not a model", where=text, hint=FORMS)
    if path.suffix == ".onnx":
        from edgec.onnx.importer import import_onnx

        return import_onnx(path, input_shape=input_shape, name=name)
    if path.suffix == ".pt2":
        if not path.exists():
            raise EdgecError("does not exist", where=text, hint=FORMS)
        if input_shape is not None:
            raise EdgecError("a .pt2 file has fixed input shapes", where="--input-shape", hint="leave it out")
        exported = rename_taken(load_pt2(path))
        return _checked(exported, _unguarded(exported), name or path.stem)
    made, examples = _made(text, input_shape)
    return _from_module(made, examples, name or text.rpartition(":")[2])


def _made(text: str, input_shape: Sequence[int] | None) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """(module, example inputs) of a factory."""
    owner, _, attribute = text.rpartition(":")
    if not owner or not attribute.isidentifier():
        raise _not_a_model(Path(text))
    factory = load_function(text)
    with user_code(text):
        made = factory()
    examples: Any = None
    if isinstance(made, tuple) and len(made) == 2:
        made, examples = made
    if not isinstance(made, nn.Module):
        raise EdgecError(
            f"returned a {type(made).__name__}", where=text, hint="return an nn.Module or (module, example inputs)"
        )
    if examples is None:
        examples = _example(made, input_shape)
    elif isinstance(examples, torch.Tensor):
        examples = (examples,)
    elif isinstance(examples, dict) and examples and all(isinstance(x, torch.Tensor) for x in examples.values()):
        made, examples = _by_name(made, examples, text), tuple(examples.values())
    if not isinstance(examples, (tuple, list)) or not all(isinstance(x, torch.Tensor) for x in examples):
        raise EdgecError(
            "returned example inputs that are not tensors",
            where=text,
            hint="return (module, x), (module, (x, y)) or (module, {'name': x})",
        )
    return made, tuple(examples)


def _by_name(module: nn.Module, examples: dict[str, torch.Tensor], text: str) -> nn.Module:
    parameters = inspect.signature(module.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in examples if not anything and name not in parameters]
    if unknown:
        raise EdgecError(
            f"returned an example input '{unknown[0]}', which forward does not take",
            where=text,
            hint=f"it takes {', '.join(parameters)}",
        )
    names, forward = list(examples), module.forward
    return StandIn(module, names, lambda *inputs: forward(**dict(zip(names, inputs, strict=True))))


def _unguarded(exported: torch.export.ExportedProgram) -> nn.Module:
    """The model as it was exported, for batches of any size: the file may allow others than the check uses."""
    module = exported.module(check_guards=False)
    module._forward_pre_hooks.clear()
    return module


def _not_a_model(path: Path) -> EdgecError:
    if not path.exists():
        return EdgecError("does not exist", where=str(path), hint=FORMS)
    if path.suffix in CHECKPOINTS:
        hint = "a checkpoint has no graph: write file.py:factory that builds the model and loads it, or export a .pt2"
    elif path.suffix == ".py":
        hint = f"name the function that makes the model: {path}:factory"
    else:
        hint = FORMS
    return EdgecError("is not a model that can be read", where=str(path), hint=hint)


def _example(module: nn.Module, input_shape: Sequence[int] | None) -> tuple[torch.Tensor, ...]:
    if input_shape is None:
        raise EdgecError(
            "has no example input",
            where=type(module).__name__,
            hint="pass --input-shape, e.g. 1,3,224,224, or return (module, example inputs) from the factory",
        )
    shape = tuple(input_shape)
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        text = ",".join(map(str, shape))
        raise EdgecError(f"'{text}' is not a shape", where="--input-shape", hint="give positive whole numbers")
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)),)


def _from_module(module: nn.Module, examples: tuple[torch.Tensor, ...], name: str) -> Program:
    with _evaluating(module):
        program = _checked(export_module(module, examples, name), module, name, fresh=True)
    # Cut the ties to the weights of the user's module, which may go on training.
    return dataclasses.replace(program, module=program.edit())


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and afterwards as it was before, gradients included."""
    modes = [(m, m.training) for m in module.modules()]
    gradients = [(p, p.requires_grad) for p in module.parameters()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)


def _checked(
    exported: torch.export.ExportedProgram, original: TensorFunction, name: str, *, fresh: bool = False
) -> Program:
    # Only Programs leave this mark in their files.
    ours = any("edgec_origin" in node.meta.get("custom", {}) for node in exported.graph.nodes)
    program = import_exported(exported, name, fresh=fresh)
    check_weights(program, half=ours)
    import_check(program, original)
    return program


def check_weights(program: Program, half: bool = True) -> None:
    """Raise EdgecError when a weight is NaN or infinite, and when a weight or input has a type that no kernel takes.

    half: weights may be float16, which `cast-fp16` makes; a model that comes with them has not been through its checks.
    """
    for path, weight in program.weights().items():
        where = f"weight '{path}' of {program.name}"
        if not half or weight.dtype is not torch.float16:
            _check_type(weight.dtype, where)
        if weight.dtype.is_floating_point and not bool(torch.isfinite(weight).all()):
            raise EdgecError("has NaN or infinite values", where=where, hint="check the checkpoint it came from")
    for spec in program.inputs:
        _check_type(getattr(torch, spec.dtype), f"input '{spec.name}' of {program.name}")


def _check_type(dtype: torch.dtype, where: str) -> None:
    if dtype.is_complex:
        raise EdgecError(f"is {dtype}", where=where, hint="write the model with real numbers")
    if dtype.is_floating_point and dtype is not torch.float32:
        hint = "convert the model with model.float() and its inputs to float32 before exporting"
        raise EdgecError(f"is {dtype}, kernels compute in torch.float32", where=where, hint=hint)


def import_check(program: Program, original: TensorFunction, *, seed: int = 0) -> None:
    """Compare a Program with the model it was made from, on random inputs; raises EdgecError when they differ.

    original: called with the Program's inputs; its outputs are flattened. Floating-point inputs are uniform in 0..1,
    drawn with `seed`, others those of the example. Where the batch is dynamic, two samples are run together, and the
    first must come out the same when it is run alone, as on the device.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(
        torch.rand(x.shape, generator=generator) if x.is_floating_point() else x for x in program.batch_inputs(2)
    )
    with quiet(), torch.no_grad():
        try:
            want = tree_leaves(original(*[x.clone() for x in inputs]))
        except Exception as error:
            raise EdgecError(
                f"does not run on its example inputs: {type(error).__name__}: {first_line(error)}",
                where=program.name,
                hint="a .pt2 file is read without its examples, integers are zeros then: give file.py:factory",
            ) from error
        got = program(*[x.clone() for x in inputs])
        alone = program(*[x[:1].clone() for x in inputs]) if program.dynamic_batch else got
    coded = comes_quantised(program)
    for spec, a, b, c in zip(program.outputs, got, want, alone, strict=True):
        error = _relative_error(a, b)
        if not error <= IMPORT_TOLERANCE and not (coded and _follows(a, b)):
            raise EdgecError(
                f"output '{spec.name}' of the exported graph differs from the model's (relative error {error:.1e})",
                where=program.name,
                hint="torch.export recorded something else than the model does; does it depend on random numbers, "
                "on global state or on values of tensors?",
            )
        first = a[:1] if program.dynamic_batch else a
        error = _relative_error(c, first)
        if not error <= BATCH_TOLERANCE and not (coded and _follows(c, first)):
            raise EdgecError(
                f"output '{spec.name}' of a sample depends on the other samples of its batch",
                where=program.name,
                hint="export it with a static batch of one",
            )


def _follows(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether results are the same but for codes that fell on the other side of a rounding boundary."""
    if got.shape != want.shape or got.dtype != want.dtype or not bool(torch.isfinite(got).all()):
        return False
    return sqnr_db(got.numpy(), want.numpy()) >= QUANTIZED_SQNR_DB


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want| over finite values; infinite when shapes or non-finite values differ."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    finite = torch.isfinite(want)
    if not torch.equal(torch.where(finite, 0, want).nan_to_num(1), torch.where(finite, 0, got).nan_to_num(1)):
        return math.inf
    a, b = got[finite].double(), want[finite].double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.numel() else 0.0


# -- nn.Module -> ExportedProgram --------------------------------------------------------------------------------------


def export_module(
    module: nn.Module, example_inputs: tuple[torch.Tensor, ...], name: str, *, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """`torch.export` of a module in evaluation mode: with a dynamic batch if that works and is wanted, else static.

    The batch is tried with two samples, because torch.export takes a dimension of one for a constant.
    Raises EdgecError with the reason and the line of the user's code when the module does not export.
    """
    for path, weight in module.named_parameters():
        # Complex weights become pairs of real ones.
        if weight.dtype is not torch.complex64:
            _check_type(weight.dtype, f"weight '{path}' of {name}")
        if weight.device.type != "cpu":
            raise EdgecError(
                f"is on {weight.device}", where=f"weight '{path}' of {name}", hint="call model.cpu() first"
            )
    batches = {x.shape[0] if x.dim() else 0 for x in example_inputs}
    if dynamic and len(batches) == 1 and 0 not in batches:
        dim = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        batched = tuple(x.repeat(2, *[1] * (x.dim() - 1)) if x.shape[0] == 1 else x for x in example_inputs)
        # Whatever goes wrong here goes wrong again below, without the dynamic batch in the message.
        with contextlib.suppress(Exception):
            exported = _export(module, batched, tuple({0: dim} for _ in batched))
            with quiet():
                exported = rewrite(rename_taken(exported), name)
            if _keeps_batch(exported):
                return exported
    try:
        return _export(module, example_inputs, None)
    except Exception as error:
        raise _export_error(module, example_inputs, name, error) from error


def _export_error(module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str, error: Exception) -> EdgecError:
    """Why a module does not export: often it does not even run."""
    what, hint = "does not export", "torch.export needs shapes and branches that do not depend on the values of tensors"
    try:
        with quiet(), torch.no_grad():
            module(*[x.clone() for x in inputs])
    except Exception as failure:
        error = failure
        shapes = " and ".join(str(list(x.shape)) for x in inputs)
        what = f"does not run on {'inputs' if len(inputs) > 1 else 'an input'} of shape {shapes}"
        hint = "check --input-shape, or return (module, example inputs) from a factory"
    line = user_frame(str(error)) or user_frame("".join(traceback.format_tb(error.__traceback__)))
    where = f"{name} ({line})" if line else name
    return EdgecError(f"{what}: {type(error).__name__}: {first_line(error)}", where=where, hint=hint)


def _export(module: nn.Module, inputs: tuple[torch.Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    # Without gradients, `with torch.no_grad()` in the model leaves no trace in the graph.
    with quiet(), torch.no_grad(), shapes_only(), masks_as_given():
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def _keeps_batch(exported: torch.export.ExportedProgram) -> bool:
    """True when dimension 0 of every output is the batch."""
    batch = _input_values(exported)[0].shape[0]
    outputs = [v for v in _output_values(exported) if isinstance(v, torch.Tensor)]
    return all(v.dim() and not isinstance(v.shape[0], int) and str(v.shape[0]) == str(batch) for v in outputs)


def _input_values(exported: torch.export.ExportedProgram) -> list[Any]:
    user = set(exported.graph_signature.user_inputs)
    return [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder" and n.name in user]


def _output_values(exported: torch.export.ExportedProgram) -> list[Any]:
    (out,) = [n for n in exported.graph.nodes if n.op == "output"]
    return [n.meta["val"] if isinstance(n, fx.Node) else n for n in tree_leaves(out.args[0])]


# -- ExportedProgram -> Program ----------------------------------------------------------------------------------------


def import_exported(exported: torch.export.ExportedProgram, name: str, *, fresh: bool = False) -> Program:
    """The Program of an exported graph, which is edited in place.

    fresh: `export_module` has just made it, so that it need not be exported once more to see whether it can be.

    In-place operators become functional ones, so that no pass has to think of aliases. Raises EdgecError for graphs in
    training mode, random numbers, control flow, shapes that depend on data, state, and anything but tensors as outputs.
    """
    rename_taken(exported)
    drop_assertions(exported)
    _check_state(exported, name)
    with quiet():
        exported = drop_empty(drop_assertions(rewrite(exported, name)))
    _check_graph(exported, name)
    with quiet(), torch.no_grad():
        exported = _functional(exported)
    _check_state(exported, name)
    # A Program's own file has been through this, and passes may have added what is to stay as it is.
    ours = any("edgec_origin" in node.meta.get("custom", {}) for node in exported.graph.nodes)
    program = Program.from_exported(exported, name, None if ours else prepare_stored, reexport=not fresh)
    program = edgec_form(program)
    if program.dynamic_batch and not _keeps_batch(exported):
        raise EdgecError(
            "the batch is dynamic, but an output does not have it as dimension 0",
            where=name,
            hint="export with a static batch of one",
        )
    return program


def _check_graph(exported: torch.export.ExportedProgram, name: str) -> None:
    for value in _output_values(exported):
        if not isinstance(value, torch.Tensor):
            raise EdgecError(f"returns {value!r} beside tensors", where=name, hint="return tensors only")
    if not _output_values(exported):
        raise EdgecError("returns nothing", where=name, hint="return at least one tensor")
    signature = exported.graph_signature
    names = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    stored = stored_nodes(exported.graph, {n for n in exported.graph.nodes if n.name in names})
    for node in exported.graph.nodes:
        if node.op == "call_function":
            _check_node(node, name, node.args[0] in stored if node.args else False)


def _check_node(node: fx.Node, name: str, stored: bool) -> None:
    """stored: whether the first operand follows from weights alone."""
    where = f"{name} ({place(node)})"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        kind = node.target.name()
        if not kind.startswith("wrap_with_"):
            raise EdgecError(f"uses control flow ({kind})", where=where, hint="write it without branches and loops")
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    arguments = {a.name: a.default_value for a in node.target._schema.arguments}
    arguments.update(zip(arguments, node.args))
    arguments.update(node.kwargs)
    # Statistics of a weight are those of every batch: weight standardisation is written so.
    if "batch_norm" in str(node.target) and arguments.get("training") and not stored:
        raise EdgecError(
            "batch norm uses statistics of the batch: the model is in training mode",
            where=where,
            hint="call model.eval() before exporting",
        )
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        switches = [arguments[s] for s in SWITCHES if s in arguments]
        if not switches or switches[0]:
            hint = "call model.eval() before exporting" if switches else "give the model its noise as an input"
            raise EdgecError(f"{node.target} gives random values", where=where, hint=hint)
    values = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    if any(free_unbacked_symbols(v) for v in values):
        raise EdgecError(
            f"the shape of the result of {node.target} depends on the values of its input",
            where=where,
            hint="write it with masks or torch.where, which keep shapes",
        )


def _check_state(exported: torch.export.ExportedProgram, name: str) -> None:
    buffers = list(exported.graph_signature.buffers_to_mutate.values())
    if buffers:
        owner, _, leaf = buffers[0].rpartition(".")
        line = _writing_line(exported, buffers[0])
        places = [f"layer {owner}"] * bool(owner) + [line] * bool(line)
        raise EdgecError(
            f"changes its buffer '{buffers[0]}' when it runs",
            where=f"{name} ({', '.join(places)})" if places else name,
            hint=f"make the state an input and an output of the model: forward(x, {leaf}) returns (y, new {leaf})",
        )


def _writing_line(exported: torch.export.ExportedProgram, buffer: str) -> str:
    """The source line of the first operator that writes a buffer, as far as it is known."""
    names = [n for n, path in exported.graph_signature.inputs_to_buffers.items() if path == buffer]
    results = [n for n, path in exported.graph_signature.buffers_to_mutate.items() if path == buffer]
    for node in exported.graph.nodes:
        first = node.args[0] if node.args else None
        if _is_inplace(node) and isinstance(first, fx.Node) and first.name in names and source_line(node):
            return source_line(node)
    made = [n for n in exported.graph.nodes if n.name in results]
    return source_line(made[0]) if made else ""


def _functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without in-place operators and without regions of `no_grad` and `autocast`."""
    for node in exported.graph.nodes:
        if _is_inplace(node):
            _replace_inplace(node, exported.graph_signature.user_inputs)
    exported.graph_module.recompile()
    if not any(_is_inplace(n) or _is_region(n) for n in exported.graph.nodes):
        return exported
    exported = exported.run_decompositions({})
    _restore_batch_norms(exported.graph_module)
    _leave_inputs_alone(exported)
    return exported


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def _is_inplace(node: fx.Node) -> bool:
    target = node.target
    return node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _replace_inplace(node: fx.Node, inputs: Collection[Any]) -> None:
    """`relu_` becomes `relu` where nothing else can see the memory it writes: a result or input without views.

    torch.export has already turned later uses of the operand into uses of this node.
    """
    target: Any = node.target
    namespace, _, name = target._schema.name.partition("::")
    functional = getattr(getattr(getattr(torch.ops, namespace), name[:-1], None), target._overloadname, None)
    operand = node.args[0] if node.args else None
    if not name.endswith("_") or functional is None or not isinstance(operand, fx.Node):
        return
    tensors = [a.meta["val"] for a in node.all_input_nodes]
    same_type = all(isinstance(t, torch.Tensor) and t.dtype == tensors[0].dtype for t in tensors)
    seen = any(u is not node and (_may_alias(u) or u > node) for u in operand.users)
    if (
        same_type
        and tensors[0].dtype.is_floating_point
        and not seen
        and (operand.name in inputs or not _may_alias(operand))
    ):
        node.target = functional


def _may_alias(node: fx.Node) -> bool:
    """True unless each result of the node is known to be memory of its own."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.op != "output"
    schema = node.target._schema
    silent = schema.name.removeprefix("aten::") in SILENT_VIEWS
    return silent or any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _restore_batch_norms(module: fx.GraphModule) -> None:
    """Retracing turns a batch norm into its native form, which returns a triple; passes know the plain one."""
    graph = module.graph
    for node in list(graph.nodes):
        if not is_call(node, aten._native_batch_norm_legit_no_training.default):
            continue
        x, weight, bias, mean, var, momentum, eps = node.args
        for user in list(node.users):
            if user.args[1] != 0:
                return
            with graph.inserting_before(user):
                plain = graph.call_function(
                    aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False)
                )
            plain.meta.update(node.meta, val=user.meta["val"])
            user.replace_all_uses_with(plain)
            graph.erase_node(user)
        graph.erase_node(node)
    module.recompile()


def _leave_inputs_alone(exported: torch.export.ExportedProgram) -> None:
    """A model that works in place on its input is as good when the input stays what it was."""
    specs = exported.graph_signature.output_specs
    (out,) = [n for n in exported.graph.nodes if n.op == "output"]
    kept = [i for i, spec in enumerate(specs) if spec.kind is not OutputKind.USER_INPUT_MUTATION]
    out.args = (tuple(out.args[0][i] for i in kept),)  # type: ignore[index]
    specs[:] = [specs[i] for i in kept]
    exported.graph_module.recompile()
