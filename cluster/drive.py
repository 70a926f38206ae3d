"""Runs scripts (see `effects.py`) under asyncio, over a carrier."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from .carriers.base import CallError, Carrier
from .effects import Call, CallFailed, Script, Sleep
from .messages import Message

T = TypeVar("T")


async def drive(script: Script[T], carrier: Carrier) -> T:
    """Result of a script whose calls go over `carrier`.

    An error other than CallError (a message beyond the frame limit, say) is raised inside the script, at its yield.
    When the driver is cancelled, calls in flight are given up and the script is closed.
    """
    try:
        effect = next(script)
        while True:
            try:
                result = await _carry_out(effect, carrier)
            except Exception as error:
                effect = script.throw(error)
            else:
                effect = script.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        script.close()


async def _carry_out(effect: list[Call] | Sleep, carrier: Carrier) -> Any:
    if isinstance(effect, Sleep):
        await asyncio.sleep(effect.seconds)
        return asyncio.get_running_loop().time()
    if len(effect) == 1:
        call = effect[0]
        return [await _answer(call, carrier.call(call.node, call.message, call.timeout_s))]
    return await _call_all(effect, carrier)


async def _call_all(calls: list[Call], carrier: Carrier) -> list[Message | CallFailed]:
    """Results of calls made in parallel."""
    started: list[asyncio.Future[Message]] = []
    results: list[Message | CallFailed] = []
    try:
        for call in calls:
            started.append(carrier.start(call.node, call.message, call.timeout_s))
        for call, future in zip(calls, started, strict=True):
            results.append(await _answer(call, future))
        return results
    except BaseException:
        for future in started:
            future.cancel()
        await asyncio.gather(*started, return_exceptions=True)
        raise


async def _answer(call: Call, answer: Awaitable[Message]) -> Message | CallFailed:
    try:
        return await answer
    except CallError as error:
        return CallFailed(call.node, error.message, error.sent)
