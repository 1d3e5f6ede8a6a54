"""Compilers of kernels and of their parts that do no more than these need.

Whatever is not here as expected, in another version of Numba, costs time to compile and nothing else: `jit`
imports this file where a failure means that Numba's own compiler serves, and so does a part where it cannot
be made in the quick way.
"""

from collections.abc import Callable
from typing import Any

from numba.core import typed_passes, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

# For closures and array expressions, of which neither kernels nor parts have any.
_NOT_NEEDED = {
    untyped_passes.InlineClosureLikes,
    untyped_passes.InlineInlinables,
    untyped_passes.LiteralUnroll,
    untyped_passes.MakeFunctionToJitFunction,
    typed_passes.InlineOverloads,
    typed_passes.NopythonRewrites,
}


class KernelCompiler(Compiler):
    """Numba's, less the passes that would find nothing to do."""

    def define_pipelines(self) -> Any:
        """The passes, in order."""
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.passes = [entry for entry in pipeline.passes if entry[0] not in _NOT_NEEDED]
        return pipelines


class PartCompiler(KernelCompiler):
    """Leaves it to kernels to optimise their parts and to make machine code of them.

    Numba does both for each part too, as Python might call it, and again for each part that it is in.
    """

    def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
        super().__init__(typing, target, library, *rest)
        try:
            self.state.library = _PartLibrary(target.codegen(), "part")
        except (AttributeError, TypeError):  # not as expected
            return
        self.state.targetctx.get_executable = _no_executable  # of this compilation only


def _no_executable(library: Any, description: Any, environment: Any) -> Callable[..., Any]:
    """What Numba knows a part by, which it never calls: it has to be built in and no other part's."""
    return [].append


class _PartLibrary(JITCodeLibrary):
    """A part, and those that it calls, as they were written."""

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        # All that is used below, so that what lacks is missed here.
        self._layout = codegen._data_layout
        self._steps = self._get_module_for_linking, self._finalize_dynamic_globals
        self._state = self._finalized, self._final_module.link_in, self._linking_libraries, self._reload_init

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._layout

    def finalize(self) -> None:
        """Gather what a kernel links."""
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True
