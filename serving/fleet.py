"""The engines of one server: started, watched, replaced and stopped, and told to the gateway's workers.

There is one way to change anything: what is new is started beside what is old; when it is verified the workers get it;
then the old gets no more requests, finishes those it has, and is stopped. A model that is added, an engine that is
restarted and a checkpoint that is exchanged differ only in what is new and what is old. On GPUs, whose memory an engine
takes whole, a restart alone is done the other way round.

The workers read one file of settings (:attr:`Fleet.settings_file`), in which models with checkpoints have engines. Each
process has a path of its own there, so that an old engine's open connections are not taken for the new one's.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

from serving.engine import Engine, StartFailed, on_cpu
from serving.gateway.settings import EngineAt, Settings
from serving.plan import Launch, Plan


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Does all of it at once; ends what is left when one fails, and raises that."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class Fleet:
    """All engines of a plan.

    Args:
        runtime: folder for sockets, states and settings; its path must be short.
        report: told what a person should know, a line each.
        publish: called when the settings file has changed; makes the workers read it.
        log_dir: folder for the engines' logs; None: not kept.
        on_change: called when an engine's state or process has changed.

    Attributes:
        plan: what is being run.
        engines: those that the workers know, draining ones included.
    """

    def __init__(
        self,
        plan: Plan,
        runtime: Path,
        report: Callable[[str], None],
        publish: Callable[[], None],
        log_dir: Path | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.settings_file = plan, runtime / "settings.json"
        self._runtime, self._report, self._publish, self._log_dir = runtime, report, publish, log_dir
        self._on_change = on_change
        self._serial = 0
        self._launches: dict[Engine, Launch] = {}  # of all engines that may have a process
        self._watching: dict[Engine, asyncio.Task[None]] = {}
        self.engines = [self._create(launch) for launch in plan.launches]
        self._write_settings()

    def _create(self, launch: Launch, start_seconds: float = 30.0) -> Engine:
        self._serial += 1
        label = f"{launch.model} #{launch.replica + 1}" if launch.replica else launch.model
        engine = Engine(
            launch.model,
            launch.checkpoint,
            launch.options,
            self._runtime,
            lambda text: self._report(f"{label}: {text}"),
            self._log_dir,
            replica=launch.replica,
            serial=self._serial,
            start_seconds=start_seconds,
            on_change=self._on_change,
        )
        self._launches[engine] = launch
        return engine

    async def start(self) -> None:
        """Starts the plan's engines.

        Raises:
            fingerprint.Mismatch: one does not compute what was trained.
            StartFailed: one ended by itself.
        """
        await self._start(self.engines)
        self._tell_workers()  # of their fingerprints

    async def apply(self, plan: Plan) -> None:
        """Makes another plan the one that runs, without a failed request. If its engines do not start, nothing changes.

        Raises:
            fingerprint.Mismatch, StartFailed: as :meth:`start`.
        """
        kept: dict[Engine, Launch] = {}
        new: list[Engine] = []
        for launch in plan.launches:
            fit = next((e for e in self.engines if e not in kept and self._usable(e, launch)), None)
            if fit is not None:
                kept[fit] = launch
            else:
                new.append(self._create(launch))
        await self._start_or_stop(new)
        self.plan = plan
        self._launches |= kept
        await self._exchange([engine for engine in self.engines if engine not in kept], new)

    def _usable(self, engine: Engine, launch: Launch) -> bool:
        return engine.state not in ("refused", "stopped") and self._launches[engine].serves(launch)

    async def roll(self) -> None:
        """Restarts every engine, one after the other.

        Raises:
            fingerprint.Mismatch, StartFailed: a new engine did not start; the old one goes on (on GPUs: it is gone, and
                the new one is tried again), and those that have not had their turn are left alone.
        """
        for old in list(self.engines):
            new = self._create(self._launches[old], old.start_seconds)
            if on_cpu():
                await self._start_or_stop([new])
                await self._exchange([old], [new])
                continue
            await self._exchange([old], [new])
            try:
                await self._start([new])
            except StartFailed:
                self._watch(new)
                raise

    async def stop(self) -> None:
        """Stops all engines, whatever they are doing."""
        await self._stop(list(self._launches))

    async def _start_or_stop(self, engines: Sequence[Engine]) -> None:
        try:
            await self._start(engines)
        except BaseException:
            await self._stop(engines)
            raise

    async def _start(self, engines: Sequence[Engine]) -> None:
        await together(*(engine.start() for engine in engines))
        for engine in engines:
            self._watch(engine)

    def _watch(self, engine: Engine) -> None:
        self._watching[engine] = asyncio.ensure_future(engine.watch())

    async def _exchange(self, old: Sequence[Engine], new: Sequence[Engine]) -> None:
        """Workers get the new engines, then lose the old ones, which are stopped when they have nothing left to do."""
        settings = self.plan.settings
        noticed = 2 * settings.probes.interval  # until every worker has seen what has changed
        # The new where the old were, so that a replica keeps its place in the list; those that leave come last.
        self.engines = sorted([*(e for e in self.engines if e not in old), *new], key=self._place)
        self.engines += old
        self._tell_workers()
        if not old:
            return
        if new:
            await asyncio.sleep(noticed)
        await self._unwatch(old)
        for engine in old:
            engine.become("draining")
        self._tell_workers()
        await asyncio.sleep(noticed)
        await asyncio.gather(*(engine.finish(settings.drain) for engine in old))
        self.engines = [engine for engine in self.engines if engine not in old]
        await self._stop(old)
        self._tell_workers()

    def _place(self, engine: Engine) -> tuple[int, int]:
        models = list(self.plan.settings.models)
        return (models.index(engine.model) if engine.model in models else len(models), engine.replica)

    async def _unwatch(self, engines: Iterable[Engine]) -> None:
        tasks = [self._watching.pop(engine) for engine in engines if engine in self._watching]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _stop(self, engines: Sequence[Engine]) -> None:
        await self._unwatch(engines)
        await asyncio.gather(*(engine.stop() for engine in engines))
        for engine in engines:
            self._launches.pop(engine, None)

    def _tell_workers(self) -> None:
        self._write_settings()
        self._publish()
        self._on_change()

    def _write_settings(self) -> None:
        new = self.settings_file.with_suffix(".new")
        new.write_text(self._effective().dump())
        new.replace(self.settings_file)

    def _effective(self) -> Settings:
        """The settings with engines in place of checkpoints."""
        settings = self.plan.settings
        models = dict(settings.models)
        for name, model in settings.models.items():
            engines = [engine for engine in self.engines if engine.model == name]
            if not model.checkpoint or not engines:
                continue
            first = engines[0]
            own = tuple(
                EngineAt(
                    url=f"unix:{engine.public}",
                    served_name=name,
                    draining=engine.state == "draining",
                    status_file=engine.status_file,
                )
                for engine in engines
            )
            models[name] = model.model_copy(
                update={
                    "checkpoint": None,
                    "replicas": 1,
                    "engines": own + model.engines,
                    "vocab_size": first.vocab_size,
                    "has_tokenizer": first.has_tokenizer,
                    "fingerprint": model.fingerprint or (first.fingerprint if first.fingerprint.exists() else None),
                }
            )
        return settings.model_copy(update={"models": models})
