"A mode in which the device 'meta' stands for a GPU: it has no values, so that whatever would read one fails"
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # torch documents it under this name
from torch.utils._pytree import tree_leaves

WAITS = {'_local_scalar_dense', 'nonzero', 'item', 'is_nonzero', 'equal', 'masked_select', 'unique', '_unique2', 'unique_dim', 'unique_consecutive',
         'bincount', 'repeat_interleave'}


class _HostData(TorchFunctionMode):
    "Refuses numbers and lists of the host as tensors of the device `kind`: torch makes them on the CPU and waits for their copy"
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get('device') is not None:
            there = torch.device(kwargs['device']).type == self.kind
            assert not there or isinstance(args[0], torch.Tensor) and args[0].device.type == self.kind, f'{func.__name__} copies {args[0]!r} to the device'
        return func(*args, **kwargs)


class Gpu(TorchDispatchMode):
    "Refuses what waits for the device `kind`, copies to it or from it, and float64 on it"
    def __init__(self, kind='meta'):
        super().__init__()
        self.kind, self.ops, self.host = kind, [], _HostData(kind)

    def __enter__(self):
        self.host.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.host.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if t.device.type == self.kind]
        self.ops.append(name)
        if there:
            assert name not in WAITS, f'{name} waits for the device'
            numbers_too = name in ('_to_copy', 'copy_')
            assert all(t.device.type == self.kind for t in tensors if t.ndim or numbers_too), f'{name} copies between devices'
            assert not any(t.dtype in (torch.float64, torch.complex128) for t in there), f'{name} uses double precision'
            if name in ('index', 'index_put', 'index_put_'):
                indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
                assert not any(t.dtype in (torch.bool, torch.uint8) for t in indices), f'{name} by a mask waits for its number'
        return out
