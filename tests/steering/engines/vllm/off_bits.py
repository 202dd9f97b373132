"""Off rows against plain vLLM, bit for bit, on a device and in a dtype that the tests do not have:

    python -m tests.steering.engines.vllm.off_bits --device cuda --dtype bfloat16 [--eager]

Eight rows a batch: plain's, then a steered engine's with off and with steered neighbours. Prints, per batch, which of
the four rows that are off have all of plain's logprobs, and the largest difference in their first step.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from tests.steering.engines.driving import Answer, make_request
from tests.steering.engines.vllm.agreement import VOCABULARY
from tests.steering.engines.vllm.conversations import in_one_step
from tests.tiny_models import save_tiny_artifact, save_tiny_llava

OFF: dict[str, Any] = {"enabled": False}
STEERED = [{"strength": 1.0}, {"strength": 0.5, "form": "union"}, {"form": "published"}, {"min_answer_tokens": 2}]
OFF_ROWS = (0, 5, 6, 7)


async def batches(model: Path, artifact: Path | None, wanted: list[list[dict]], **options: Any) -> list[list[Answer]]:
    """Each batch is admitted in one step, so that every step has the same rows in every engine."""
    from steering.engines.vllm.engine import VllmEngine

    engine = VllmEngine(model, artifact, gpu_memory_share=0.2, kv_cache_gib=0.05, **options)
    await engine.start()
    try:
        return [
            await in_one_step(
                engine,
                [
                    make_request(engine, f"{row} of them", (row,), one, max_tokens=12, top_logprobs=VOCABULARY,
                                 logit_bias={257: -100.0})
                    for row, one in enumerate(batch)
                ],
            )
            for batch in wanted
        ]  # fmt: skip
    finally:
        await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled, no CUDA graphs")
    asked = parser.parse_args()
    extra: dict[str, Any] = {"enforce_eager": True} if asked.eager else {}
    extra |= {"block_size": 32} if asked.device == "cpu" else {"kv_cache_memory_bytes": 2**29}
    options = {"device": asked.device, "dtype": asked.dtype, "branches": 1, "vllm_arguments": extra}
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_llava(Path(folder) / "model", num_kv_heads=4, hidden_size=256)
        artifact = save_tiny_artifact(Path(folder) / "artifact", model)
        [plain] = asyncio.run(batches(model, None, [[OFF] * 8], **options))
        wanted = [[OFF, *beside, OFF, {"strength": 0.0}, OFF] for beside in ([OFF] * 4, STEERED)]
        for beside, rows in zip(
            ("off", "steered"), asyncio.run(batches(model, artifact, wanted, **options)), strict=True
        ):
            same = [row for row in OFF_ROWS if rows[row].logprobs() == plain[row].logprobs()]
            first = [(rows[row].logprobs()[0], plain[row].logprobs()[0]) for row in OFF_ROWS]
            far = max(abs(ours[token] - theirs[token]) for ours, theirs in first for token in theirs if token in ours)
            print(f"neighbours {beside}: plain's bits in rows {same} of {list(OFF_ROWS)}, first step within {far:.2g}")


if __name__ == "__main__":
    main()
