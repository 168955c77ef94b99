"""The projection inside vLLM's workers: an operator behind the keys and values of chosen layers.

vLLM mixes `KVOperators` into its workers (`worker_extension_cls`), which imports this module before the model is
loaded. From then on a loaded model has a custom operator at each site: behind `k_proj`, `v_proj` or their part of a
fused `qkv_proj`, or in front of attention for keys after RoPE. The operator reads its matrix from a buffer, which a
later call fills: so it is part of a compiled graph and of a captured CUDA graph, where a Python hook would silently be
left out, and one engine serves the policy projected and as it is.

Shapes: N tokens, D width of a site over all ranks, d this rank's part of it.
"""

# vLLM is not installed where the types are checked: its pins are its own.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

SITES = "SPD_VLLM_SITES"
"""Environment variable: the sites that may be projected, as JSON."""
MEASURED_ROWS = 64
TINY = 1e-30


class _Site:
    """One place where an operator acts."""

    def __init__(self, width: int, part: slice, gather: int, like: Tensor) -> None:
        """`part` are this rank's columns, `gather` how many ranks hold the same KV head; 0 where nothing is shared."""
        self.part, self.gather = part, gather
        self.matrix_DD = torch.eye(width, dtype=like.dtype, device=like.device)
        self.is_projector = torch.zeros((), dtype=torch.bool, device=like.device)
        self.seen_3 = torch.zeros(3, dtype=torch.float64, device=like.device)
        """Calls, tokens, and the largest leakage of a call."""

    def apply(self, z_Nd: Tensor) -> Tensor:
        """This rank's columns of z M; counted and measured."""
        z_ND = z_Nd if self.gather == 0 else _whole(z_Nd, self.gather)
        after_ND = z_ND @ self.matrix_DD
        seen_ND = after_ND[:MEASURED_ROWS]
        source_ND = torch.where(self.is_projector, seen_ND, z_ND[:MEASURED_ROWS])
        gap_ND = seen_ND.float() - source_ND.float() @ self.matrix_DD.float()
        leakage = gap_ND.norm() / seen_ND.float().norm().clamp_min(TINY)
        self.seen_3[0] += 1
        self.seen_3[1] += z_Nd.shape[0]
        self.seen_3[2] = torch.maximum(self.seen_3[2], leakage.double())
        return after_ND[:, self.part].contiguous() if self.gather else after_ND


def _whole(z_Nd: Tensor, copies: int) -> Tensor:
    """The columns of all ranks, KV head after KV head; heads that several ranks hold once."""
    size = get_tensor_model_parallel_world_size()
    z_ND = tensor_model_parallel_all_gather(z_Nd.contiguous(), dim=-1)
    return z_ND if copies == 1 else z_ND.unflatten(-1, (size, -1))[:, ::copies].flatten(1)


_SITES: dict[str, _Site] = {}


def _project(z: Tensor, site: str) -> Tensor:
    return _SITES[site].apply(z)


def _project_shape(z: Tensor, site: str) -> Tensor:
    return torch.empty_like(z)


direct_register_custom_op("spd_project", _project, fake_impl=_project_shape)


class KVOperators:
    """What vLLM's workers can do beside their own work, by `collective_rpc`."""

    def spd_set_operators(self, path: str | None) -> int:
        """Take the matrices of a safetensors file, or none: every site not in it puts out what it was given.

        Counts begin anew. Gives the number of sites that have an operator.
        """
        from safetensors.torch import load_file

        tensors = {} if path is None else load_file(path)
        with torch.no_grad():
            for name, site in _SITES.items():
                matrix_DD = tensors.get(name, torch.eye(len(site.matrix_DD)))
                site.matrix_DD.copy_(matrix_DD)
                site.is_projector.fill_(bool((matrix_DD.double() @ matrix_DD.double() - matrix_DD).abs().max() < 1e-5))
                site.seen_3.zero_()
        return len(tensors.keys() & _SITES.keys())

    def spd_seen(self) -> dict[str, list[float]]:
        """Calls, tokens and the largest leakage of each site since the operators were set."""
        return {name: site.seen_3.tolist() for name, site in _SITES.items()}


def install(model: nn.Module, sites: list[dict[str, Any]]) -> None:
    """Put an operator at each site: `name`, `module` (dotted, as of transformers), `kind`, `width`, `after_rope`.

    Raises:
        ValueError: the model has no such module, or one of another width. Sites of other pipeline stages are left out.
    """
    modules = dict(model.named_modules())
    for site in sites:
        parent, _, leaf = site["module"].rpartition(".")
        if parent not in modules:
            if _is_elsewhere(modules, parent):
                continue
            raise ValueError(f"{site['name']}: vLLM's {type(model).__name__} has no module {parent}")
        if site["after_rope"]:
            _behind_rope(site, modules[parent])
            continue
        module = modules.get(f"{parent}.{leaf}", modules.get(f"{parent}.qkv_proj"))
        if module is None:
            raise ValueError(
                f"{site['name']}: vLLM's {type(model).__name__} has neither {leaf} nor qkv_proj in {parent}"
            )
        is_fused = isinstance(_base(module), QKVParallelLinear)
        (_behind_fused if is_fused else _behind_linear)(site, module)


def _base(module: Any) -> Any:
    """The layer inside one that carries adapters; vLLM's, whose fields torch does not type."""
    return module.base_layer if hasattr(module, "base_layer") else module


def _is_elsewhere(modules: dict[str, nn.Module], parent: str) -> bool:
    """Whether the layer belongs to another rank of a pipeline: vLLM puts a stand-in in its place."""
    layer = parent.rpartition(".")[0]
    return type(modules.get(layer)).__name__ == "PPMissingLayer"


def _add(site: dict[str, Any], local_width: int, like: Tensor) -> str:
    size, width = get_tensor_model_parallel_world_size(), site["width"]
    if local_width == width and size == 1:
        _SITES[site["name"]] = _Site(width, slice(None), 0, like)
        return site["name"]
    copies = size * local_width // width
    if copies * width != size * local_width:
        raise ValueError(f"{site['name']}: {size} ranks hold {local_width} columns each, which is not {width}")
    start = get_tensor_model_parallel_rank() // copies * local_width
    _SITES[site["name"]] = _Site(width, slice(start, start + local_width), copies, like)
    return site["name"]


def _like(module: nn.Module) -> Tensor:
    """A tensor of the dtype and device of the module's output; its weight may be repacked, and is of no use."""
    device = next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    return torch.empty(0, dtype=_base(module).params_dtype, device=device)


_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _wrap_forward(module: nn.Module, before: Callable[..., _Inputs], after: Callable[[Any], Any]) -> None:
    """Let `module` run on what `before` makes of its inputs, and give what `after` makes of its output."""
    forward = module.forward

    def wrapped(*args: Any, **options: Any) -> Any:
        args, options = before(args, options)
        return after(forward(*args, **options))

    module.forward = wrapped


def _replace_output(module: nn.Module, project: Callable[[Tensor], Tensor]) -> None:
    """Let a linear module, which may give its bias beside, put out what `project` makes of its output."""

    def projected(output: Any) -> Any:
        return (project(output[0]), *output[1:]) if isinstance(output, tuple) else project(output)

    _wrap_forward(module, lambda args, options: (args, options), projected)


def _behind_fused(site: dict[str, Any], module: nn.Module) -> None:
    base = _base(module)
    q, k = base.num_heads * base.head_size, base.num_kv_heads * base.head_size
    v = base.num_kv_heads * base.v_head_size
    start, width = (q, k) if site["kind"] == "key" else (q + k, v)
    name = _add(site, width, _like(module))

    def project(whole: Tensor) -> Tensor:
        before, z, after = whole.split([start, width, whole.shape[-1] - start - width], dim=-1)
        return torch.cat([before, torch.ops.vllm.spd_project(z.contiguous(), name), after], dim=-1)

    _replace_output(module, project)


def _behind_linear(site: dict[str, Any], module: nn.Module) -> None:
    width = _base(module).output_size_per_partition if hasattr(_base(module), "tp_size") else site["width"]
    name = _add(site, width, _like(module))
    _replace_output(module, lambda output: torch.ops.vllm.spd_project(output.contiguous(), name))


def _behind_rope(site: dict[str, Any], parent: nn.Module) -> None:
    attention: Any = next((module for module in parent.modules() if isinstance(module, Attention)), None)
    if attention is None:
        raise ValueError(f"{site['name']}: vLLM has no attention of its usual kind there, whose keys could be reached")
    linear = next(module for module in parent.modules() if hasattr(module, "params_dtype"))
    name = _add(site, attention.num_kv_heads * attention.head_size, _like(linear))

    def project(key: Tensor) -> Tensor:
        return torch.ops.vllm.spd_project(key.reshape(key.shape[0], -1).contiguous(), name).view(key.shape)

    def projected(args: tuple[Any, ...], options: dict[str, Any]) -> _Inputs:
        if "key" in options:
            return args, options | {"key": project(options["key"])}
        query, key, *rest = args
        return (query, project(key), *rest), options

    _wrap_forward(attention, projected, lambda output: output)


def _installing(worker: type) -> None:
    """Let the workers of a class install the operators on what they have loaded, before it is compiled."""
    load_model = worker.load_model

    def load_and_install(self: Any, *args: Any, **options: Any) -> None:
        load_model(self, *args, **options)
        install(self.model_runner.get_model(), json.loads(os.environ.get(SITES, "[]")))

    worker.load_model = load_and_install


for _worker in {Worker, CPUWorker}:
    if "load_model" in vars(_worker):
        _installing(_worker)
