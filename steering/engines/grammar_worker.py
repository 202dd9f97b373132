"""The process that tries whether a schema becomes a grammar, within bounds: one schema, one process.

Run as a script (`python -I grammar_worker.py CPU_S MEMORY_BYTES`) with an empty environment and the job as JSON on
stdin: `vocabulary` (one string a token, a character a byte), `ends` (token ids) and `schema`. Ends with ACCEPTED or,
with the reason on stdout, REFUSED; whatever else ends it was the schema's size. Some schemas of a few bytes keep the
compiler busy for ever, and inside the engine nothing could stop it.

It needs the library's compiled part only: with all that `import xgrammar` brings (torch, transformers) it would start
in seconds instead of half of one.
"""

import importlib.util
import json
import math
import os
import resource
import sys
import types

ACCEPTED, REFUSED = 0, 3
UNFULFILLABLE = "no value can follow it"


def library() -> types.ModuleType:
    """xgrammar's compiled part (`xgrammar.base._core`)."""
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] - importing it fails, which is foreseen
    found = importlib.util.find_spec("xgrammar")
    assert found is not None
    package = types.ModuleType("xgrammar")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["xgrammar"] = package
    importlib.import_module("xgrammar.load_binding")
    return importlib.import_module("xgrammar.base")._core


def limit_resources(cpu_s: float, memory_bytes: int) -> None:
    """From now on; others come first."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_limit = math.ceil(used.ru_utime + used.ru_stime + cpu_s)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)


def check(job: dict) -> None:
    """Raises what the library raises, or ValueError. The options are those of the engines."""
    import numpy

    core = library()
    vocabulary = [token.encode("latin-1") for token in job["vocabulary"]]
    info = core.TokenizerInfo(vocabulary, 0, len(vocabulary), job["ends"], False)
    limit_resources(float(sys.argv[1]), int(sys.argv[2]))
    compiler = core.GrammarCompiler(info, 1, False, -1)
    grammar = compiler.compile_json_schema(job["schema"], False, None, (",", ":"), True, None, False)
    allowed = numpy.full((1, -(-len(vocabulary) // 32)), -1, dtype=numpy.int32)
    core.GrammarMatcher(grammar, job["ends"], False, -1, None).fill_next_token_bitmask(allowed, 0, False)
    if not allowed.any():
        raise ValueError(UNFULFILLABLE)


def main() -> int:
    try:
        check(json.load(sys.stdin))
    except MemoryError:
        raise
    except Exception as error:
        print(str(error).strip().rpartition("/project/")[2][:300])
        return REFUSED
    return ACCEPTED


if __name__ == "__main__":
    sys.exit(main())
