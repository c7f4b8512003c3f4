"""GET /v1/capacity: what a session costs, and how many fit. Figures are of the moment."""

import asyncio

from cottention.server.answers import Shape
from cottention.server.context import ContextDep
from cottention.server.openapi import refusals
from cottention.server.session_answers import Capacity
from fastapi import APIRouter

router = APIRouter()


@router.get("/v1/capacity", response_model=Capacity, responses=refusals(401))
async def capacity(context: ContextDep) -> Shape:
    """What the pool, the memory and the disk hold."""
    stats, cost = context.bridge.stats(), context.session_bytes
    sizes = await asyncio.to_thread(context.sessions.sizes)
    return {
        "object": "capacity",
        "bytes_per_session": cost.items,
        "bytes_per_place": cost.places,
        "sessions_per_gb": cost.per_gb(),
        "slots": stats.num_slots,
        "free_slots": stats.num_free_slots,
        "paused_states": stats.num_paused_states,
        "max_paused_states": stats.max_paused_states,
        "resident": sizes.num_resident,
        "parked": sizes.num_parked,
        "stored": sizes.num_stored,
        "parked_bytes": sizes.parked_bytes,
        "stored_bytes": sizes.stored_bytes,
    }
