"""What the loopback server keeps, and how W&B's GraphQL describes it: runs, artifacts, sweeps.

A node holds every field that any request of wandb 0.31 selects: the client passes over those that it did not ask for.
"""

import base64
import hashlib
import itertools
import json
import math
import operator
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml

Json = dict[str, Any]

ENTITY = "loopback"


def now() -> str:
    """Returns the time as W&B writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")


@dataclass(eq=False, repr=False)
class Run:
    """What was sent of a run.

    Attributes:
        number: Its place among all runs of the server, from 1.
        state: running, finished or failed.
        config: Plain values by name; what wandb keeps there about itself is in `wandb_config`.
        history: Rows as they were sent: dictionaries stay nested, NaN is NaN.
        events: Rows of system metrics.
        output: Lines of the console, with level and time as wandb writes them.
        preempting: Whether its machine was being taken away.
        files: Bytes by name, media among them.
    """

    entity: str
    project: str
    id: str
    number: int
    display_name: str
    created: str = field(default_factory=now)
    state: str = "running"
    exit_code: int | None = None
    config: Json = field(default_factory=dict)
    wandb_config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    preempting: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    program: str | None = None
    sweep: str | None = None
    tags: list[str] = field(default_factory=list)
    used_artifacts: list["Artifact"] = field(default_factory=list)
    logged_artifacts: list["Artifact"] = field(default_factory=list)

    @property
    def node_id(self) -> str:
        """What GraphQL calls it."""
        return node_id("Run", self.number)

    def node(self) -> Json:
        """Returns the run as GraphQL has it."""
        project = project_node(self.entity, self.project)
        config = {name: {"value": value} for name, value in {**self.config, "_wandb": self.wandb_config}.items()}
        last_step = max((row.get("_step", -1) for row in self.history), default=-1)
        keys: Json = {key: {} for row in self.history for key in row}
        return {
            **{"__typename": "Run", "id": self.node_id, "name": self.id, "displayName": self.display_name},
            **{"project": project, "projectId": str(project["number"]), "user": {"name": ENTITY, "username": ENTITY}},
            **{"tags": self.tags, "group": self.group, "jobType": self.job_type, "sweepName": self.sweep},
            **{"notes": self.notes, "description": None, "commit": None, "readOnly": False},
            **{"state": self.state, "createdAt": self.created, "heartbeatAt": self.created},
            **{"config": text(config), "wandbConfig": text({"t": self.wandb_config.get("t")})},
            **{"summaryMetrics": text(self.summary), "systemMetrics": text(self.events[-1] if self.events else {})},
            **{"historyLineCount": len(self.history), "eventsLineCount": len(self.events)},
            **{"historyTail": json.dumps([text(row) for row in self.history[-1:]]), "logLineCount": len(self.output)},
            **{"eventsTail": json.dumps([text(row) for row in self.events[-1:]])},
            **{"historyKeys": {"lastStep": last_step, "keys": keys}},
        }

    def attribute(self, key: str) -> Any:
        """Returns what filters and orders call `config.lr`, `summary_metrics.loss`, `state`, `tags`, ..."""
        names = {"name": self.id, "jobType": self.job_type, "created_at": self.number, "summary_metrics": self.summary}
        return lookup({**vars(self), **names}, key.removesuffix(".value"))

    def matches(self, wanted: Json) -> bool:
        """Tells whether it is one that a filter in MongoDB's dialect asks for.

        Raises:
            ValueError: The filter has an operator that is not known here.
        """
        for key, asked in wanted.items():
            if key in ("$and", "$or"):
                holds = (all if key == "$and" else any)(self.matches(part) for part in asked)
            else:
                conditions = asked if isinstance(asked, dict) else {"$eq": asked}
                holds = all(_compare(self.attribute(key), *condition) for condition in conditions.items())
            if not holds:
                return False
        return True


@dataclass(eq=False, repr=False)
class Artifact:
    """One version of a collection.

    Attributes:
        version: Its place in the collection; None until it is committed.
        requested: Aliases that it gets when it is committed.
        files: Bytes by path.
        md5: What the client said of each path, base64; other bytes are refused.
        logged_by: The run that brought it first.
    """

    id: str
    collection: "Collection"
    digest: str
    metadata: Json
    description: str | None
    requested: list[str]
    logged_by: Run | None
    created: str = field(default_factory=now)
    used_by: list[Run] = field(default_factory=list)
    version: int | None = None
    aliases: set[str] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)
    md5: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The collection's name with the version."""
        return f"{self.collection.name}:v{self.version}"

    def node(self) -> Json:
        """Returns the artifact as GraphQL has it."""
        collection = self.collection.node()
        aliases = [
            {"__typename": "ArtifactAlias", "id": node_id("Alias", alias), "alias": alias} for alias in self.aliases
        ]
        return {
            **{"__typename": "Artifact", "id": self.id, "digest": self.digest, "digestAlgorithm": "MANIFEST_MD5"},
            **{"artifactSequence": collection, "artifactType": {"name": self.collection.type}, "tags": []},
            **{"aliases": [alias | {"artifactCollection": collection} for alias in aliases]},
            **{"state": "PENDING" if self.version is None else "COMMITTED", "versionIndex": self.version},
            **{"metadata": text(self.metadata), "description": self.description, "commitHash": None},
            **{"size": sum(map(len, self.files.values())), "fileCount": len(self.files), "historyStep": None},
            **{"createdAt": self.created, "updatedAt": None, "ttlDurationSeconds": -1, "ttlIsInherited": True},
        }

    def membership(self) -> Json:
        """Returns the artifact as a member of its collection, as GraphQL has it."""
        node = self.node()
        same = {name: node[name] for name in ("versionIndex", "createdAt", "aliases")}
        ids = {"__typename": "ArtifactCollectionMembership", "id": node_id("Member", self.id)}
        return {**ids, **same, "artifactCollection": node["artifactSequence"], "artifact": node}


@dataclass(eq=False, repr=False)
class Collection:
    """The committed versions under one name, oldest first."""

    entity: str
    project: str
    name: str
    type: str
    created: str = field(default_factory=now)
    versions: list[Artifact] = field(default_factory=list)

    def find(self, alias: str) -> Artifact | None:
        """Returns the version that is v0, v1, ... or bears an alias."""
        return next((one for one in self.versions if alias == f"v{one.version}" or alias in one.aliases), None)

    def move(self, aliases: Iterable[str], artifact: Artifact) -> None:
        """Takes aliases from whatever version bears them, and gives them to one."""
        for one in self.versions:
            one.aliases.difference_update(aliases)
        artifact.aliases.update(aliases)

    def node(self) -> Json:
        """Returns the collection as GraphQL has it."""
        number = node_id("ArtifactSequence", f"{self.entity}/{self.project}/{self.name}")
        return {
            **{"__typename": "ArtifactSequence", "id": number, "name": self.name, "description": None},
            **{"project": project_node(self.entity, self.project), "type": {"name": self.type}},
            **{"createdAt": self.created, "updatedAt": None, "tags": connection([])},
        }


@dataclass(frozen=True)
class Trial:
    """A run that an agent was told to start.

    Attributes:
        agent: GraphQL's id of the agent.
        values: What the agent was given, nested groups as mappings.
    """

    run_id: str
    agent: str
    values: Json


@dataclass(eq=False, repr=False)
class Sweep:
    """A sweep, whose agents are given the configurations of `plan` one after the other, and then sent home.

    Attributes:
        config: The YAML as it was sent.
        plan: What is still to be given. A grid makes its own; for other methods a test says what.
        trials: What was given, in order, and to whom.
        stops: Tells of a run that is under way whether its agent is to stop it.
        stopped: The runs that agents were told to stop.
    """

    entity: str
    project: str
    id: str
    config: str
    created: str = field(default_factory=now)
    state: str = "RUNNING"
    plan: list[Json] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    stops: Callable[[Run], bool] = lambda run: False
    stopped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.configure(self.config)

    @property
    def node_id(self) -> str:
        """What GraphQL calls it."""
        return node_id("Sweep", self.id)

    @property
    def settings(self) -> Json:
        """What the YAML holds."""
        settings: Json = yaml.safe_load(self.config)
        return settings

    def configure(self, config: str) -> None:
        """Takes a YAML, and plans what of its grid was not given yet."""
        self.config = config
        grid = combinations(self.settings["parameters"]) if self.settings["method"] == "grid" else []
        given = [trial.values for trial in self.trials]
        self.plan = [values for values in grid if values not in given]

    def adopt(self, run: Run) -> None:
        """Puts a run into the sweep that was made elsewhere: its configuration is not tried again."""
        run.sweep = self.id
        self.plan = [values for values in self.plan if not _holds(run.config, values)]

    def node(self) -> Json:
        """Returns the sweep as GraphQL has it, without its runs."""
        return {
            **{"__typename": "Sweep", "id": self.node_id, "name": self.id, "displayName": None, "description": None},
            **{"project": project_node(self.entity, self.project), "method": self.settings["method"]},
            **{"state": self.state, "config": self.config, "createdAt": self.created, "updatedAt": None},
            **{"heartbeatAt": None, "bestLoss": None, "runCountExpected": None},
        }


def combinations(parameters: Json) -> list[Json]:
    """Returns what a grid has an agent be given: sorted by name, nested groups last; the last name changes fastest."""
    names = sorted(parameters, key=lambda name: ("parameters" in parameters[name], name))
    choices = [_choices(parameters[name]) for name in names]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*choices)]


def _choices(parameter: Json) -> list[Any]:
    if "parameters" in parameter:
        return list(combinations(parameter["parameters"]))
    return list(parameter["values"]) if "values" in parameter else [parameter["value"]]


def _holds(config: Any, values: Any) -> bool:
    """Tells whether a configuration has some values, which may be nested or have dots in their names."""
    if isinstance(config, dict) and isinstance(values, dict):
        return all(_holds(lookup(config, name), value) for name, value in values.items())
    return bool(config == values)


def node_id(kind: str, name: object) -> str:
    """Returns an id of GraphQL's kind: the client insists on base64."""
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


def project_node(entity: str, project: str) -> Json:
    """Returns a project as GraphQL has it."""
    number = zlib.crc32(f"{entity}/{project}".encode())
    ids = {"__typename": "Project", "id": node_id("Project", number), "internalId": node_id("ProjectId", number)}
    names = {"name": project, "entityName": entity, "entity": {"id": node_id("Entity", entity), "name": entity}}
    return {**ids, **names, "number": number, "createdAt": now(), "isBenchmark": False, "readOnly": False, "user": None}


def connection(nodes: Sequence[Json], page: Json | None = None) -> Json:
    """Returns the page of nodes that is asked for; a cursor is the number of nodes before the next one."""
    page = page or {}
    first = int(first_of(page, "cursor", "after", "fileCursor") or 0)
    end = first + (first_of(page, "perPage", "first", "fileLimit") or len(nodes))
    edges = [{"node": node, "cursor": str(first + 1 + index)} for index, node in enumerate(nodes[first:end])]
    info = {"__typename": "PageInfo", "endCursor": str(first + len(edges)), "hasNextPage": end < len(nodes)}
    return {"edges": edges, "pageInfo": info, "totalCount": len(nodes)}


def first_of(variables: Json, *names: str) -> Any:
    """Returns the first value that is there: one thing has several names in requests."""
    return next((variables[name] for name in names if variables.get(name) is not None), None)


def md5(body: bytes) -> str:
    """Returns the checksum that W&B gives bytes, in base64."""
    return base64.b64encode(hashlib.md5(body).digest()).decode()


def sayable(value: Any) -> Any:
    """Returns a value with "NaN", "Infinity" and "-Infinity" in place of the numbers that JSON lacks.

    W&B's server was seen to give them back as such text: github.com/wandb/sweeps/pull/32.
    """
    if isinstance(value, dict):
        return {key: sayable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [sayable(inner) for inner in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def text(value: Json) -> str:
    """Returns a value as the JSON text that W&B puts inside its JSON."""
    return json.dumps(sayable(value))


def lookup(values: Any, key: str) -> Any:
    """Returns the value under a key, which has dots where dictionaries are nested; None if there is none."""
    if not isinstance(values, dict):
        return None
    outer, dot, inner = key.partition(".")
    return values[key] if key in values else lookup(values.get(outer), inner) if dot else None


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    **{"$eq": operator.eq, "$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le},
    **{"$in": lambda value, asked: value in asked, "$regex": lambda value, asked: re.search(asked, value)},
}


def _compare(value: Any, name: str, asked: Any) -> bool:
    """Tells whether a comparison holds; for a list it is enough that it holds for one of the members."""
    if name == "$ne":
        return not _compare(value, "$eq", asked)
    if name not in COMPARISONS:
        raise ValueError(f"filter with {name}")
    members = value if isinstance(value, list) else [value]
    return any(COMPARISONS[name](one, asked) for one in members if one is not None or name == "$eq")
