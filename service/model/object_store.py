"""Room for pixels on their way to the model: Ray's object store holds them until their request has ended.

What does not fit there Ray writes to a disk, where strangers' pictures do not belong: so it has to hold all that the
admitted requests may hold, and to lie in memory. Knows no request.
"""

from __future__ import annotations

import logging
import shutil

from service.settings import MIB, Settings
from steering.cluster.local_ray import SHARED_MEMORY

log = logging.getLogger(__name__)
SHADOWS_OF_MEMORY = 16
"""Shadows may hold this part of what callers may: pixels."""
OTHER_BYTES = 128 * MIB
"""Gaps between objects, those that are about to be freed, and Serve's own."""


def needed_bytes(settings: Settings, ingress_replicas: int = 1) -> int:
    """Most that the requests of so many ingress replicas keep there: pixels, shadows' pixels, and the texts of each."""
    pixels = settings.max_memory_bytes + settings.max_memory_bytes // SHADOWS_OF_MEMORY
    return ingress_replicas * (pixels + settings.max_concurrent_requests * MIB) + OTHER_BYTES


def fits_into_memory(store_bytes: int) -> bool:
    """Whether a store of this size finds room in this machine's shared memory."""
    return shutil.disk_usage(SHARED_MEMORY).free >= store_bytes


def warn_of_small_store(settings: Settings) -> None:
    """Say by name where this machine's store is smaller than what one ingress replica admits. Nothing outside Ray."""
    import ray  # reads its environment when it is imported, and `python -m service` imports this before it sets that

    if not ray.is_initialized():
        return
    here = ray.get_runtime_context().get_node_id()
    [room] = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["NodeID"] == here]
    if room < (needed := needed_bytes(settings)):
        log.warning(
            "max_memory_bytes: requests may hold %d MiB in Ray's object store, which has %d here: pixels may go to a "
            "disk; raise object-store-memory of `ray start`, or lower max_memory_bytes",
            needed // MIB,
            room // MIB,
        )
