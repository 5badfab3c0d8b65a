"""The far end of W&B's wire on 127.0.0.1: takes and gives back what wandb's own client sends, and keeps it in memory.

It knows what wandb 0.31 asks, and answers what that client needs, which is less than the real service says.
"""

import base64
import contextlib
import fnmatch
import json
import math
import mimetypes
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from loopback_records import (
    ENTITY,
    Artifact,
    Collection,
    Json,
    Run,
    Sweep,
    Trial,
    connection,
    first_of,
    lookup,
    md5,
    node_id,
    now,
    project_node,
    sayable,
    text,
)

Key = tuple[str, str, str]

API_KEY = "0123456789abcdef0123456789abcdef01234567"

# Asked by some clients, and done without.
HARMLESS = {"OrganizationCoreWeaveOrganizationID", "XXHashDigestsEnabled", "/sdk/otel/v1/metrics"}


class Refusal(Exception):
    """Becomes an answer with an error in it. Of the statuses, the client repeats a request only after 429 and 5xx."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


class LoopbackServer:
    """Serves while it is entered; what it was sent can be looked at then and afterwards.

    Attributes:
        runs: By (entity, project, id).
        artifacts: By (entity, project, name).
        sweeps: By (entity, project, id).
        asked: Names of GraphQL operations, and paths of other requests that are no uploads or downloads, in order.
        unknown: What was asked and not understood; a test asserts that there is nothing.
        operations: What answers a GraphQL operation, given its variables; a test may put its own there.
        lost_answers: How many of the next posts of rows are stored, and then answered as if they were not.
        latency: Seconds that every answer takes.
        failing: The share of all requests that is answered with status 500, and does nothing.
        silent: Whether requests are taken and never answered; those that wait are dropped once it is False again.
        rejects_key: Whether the account's key counts as invalid.
    """

    def __init__(self) -> None:
        self.latency = self.failing = 0.0
        self.silent = self.rejects_key = False
        self._chance = random.Random(0)
        self._port = 0  # until it is started: any that is free
        self.runs: dict[Key, Run] = {}
        self.artifacts: dict[Key, Collection] = {}
        self.sweeps: dict[Key, Sweep] = {}
        self.asked: list[str] = []
        self.unknown: list[str] = []
        self.lost_answers = 0
        self._by_id: dict[str, Artifact] = {}  # also by the ids that clients make up
        self._agents: dict[str, Sweep] = {}
        self._storage: list[tuple[dict[str, bytes], str, str | None]] = []  # files, name in them, checksum
        self._lock = threading.RLock()
        table: dict[str, Callable[[Json], Json]] = {
            "Viewer GetViewer GetDefaultEntity": self._viewer,
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "GetProject": lambda variables: self._in_project(variables | {"project": variables["name"]}),
            # Runs
            "UpsertBucket": self._upsert_run,
            "RunResumeStatus": self._resume_status,
            "CreateRunFiles": self._create_run_files,
            "Run RunHistoryKeys": self._run,
            "Runs": self._list_runs,
            "RunFiles": self._list_run_files,
            "RunFullHistory": self._full_history,
            "RunSampledHistory SampledHistoryPage": self._sampled_history,
            "RunParquetHistory": self._no_parquet_history,
            "HistoryPage": self._history_page,
            # Artifacts
            "ArtifactType": self._artifact_type,
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": self._create_manifest,
            "CreateArtifactFiles": self._create_artifact_files,
            "CommitArtifact": self._commit_artifact,
            "UseArtifact": self._use_artifact,
            "UpdateArtifact": self._update_artifact,
            "AddAliases": lambda variables: self._change_aliases(variables, added=True),
            "DeleteAliases": lambda variables: self._change_aliases(variables, added=False),
            "ClientIDMapping": lambda variables: {"clientIDMapping": {"serverID": self._artifact(variables).id}},
            "ArtifactByID": lambda variables: {"artifact": self._artifact(variables).node()},
            "FetchArtifactManifest": self._manifest,
            "ArtifactMembershipByName": self._membership,
            "ArtifactMembershipFiles GetArtifactMembershipFileUrls": self._list_artifact_files,
            "ArtifactCreatedBy ArtifactUsedBy": self._lineage,
            "RunInputArtifacts": lambda variables: self._artifacts_of_run(variables, "used_artifacts"),
            "RunOutputArtifacts": lambda variables: self._artifacts_of_run(variables, "logged_artifacts"),
            "ProjectArtifacts": self._list_versions,
            "ProjectArtifactTypes": self._list_types,
            "ArtifactTypeArtifactCollections": self._list_collections,
            # Sweeps
            "UpsertSweep": self._upsert_sweep,
            "SweepWithRuns GetSweep": self._sweep,
            "CreateAgent": self._create_agent,
            "Heartbeat": self._heartbeat,
        }
        self.operations = {name: handler for names, handler in table.items() for name in names.split()}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begins to serve, after a stop with all that it had, where it was before."""
        self._http = _HttpServer(self, self._port)
        self._port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Dies: breaks off every connection, and takes no new one. Does nothing if it is dead."""
        self._http.shutdown()
        self._http.server_close()
        self._http.break_off()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        """Returns the variables under which wandb speaks to this server, without delay, and to no other."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1",
        }

    def artifact(self, path: str) -> Artifact:
        """Returns the version that is called ENTITY/PROJECT/NAME:ALIAS; a KeyError if there is none."""
        entity, project, name = path.split("/")
        found = self._find_artifact({"entity": entity, "project": project, "name": name})
        if found is None:
            raise KeyError(path)
        return found

    # Requests

    def disturb(self) -> None:
        """Does to a request what the server is told to do to requests; a ConnectionError ends it unanswered."""
        time.sleep(self.latency)
        if self.silent:
            while self.silent and self._http.serves:
                time.sleep(0.05)
            raise ConnectionError
        with self._lock:
            if self._chance.random() < self.failing:
                raise Refusal("something broke here", HTTPStatus.INTERNAL_SERVER_ERROR)

    def answer(self, request: Json) -> Json:
        """Returns the data that a GraphQL request asks for."""
        named = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
        name = request.get("operationName") or (named[1] if named else request["query"])
        variables = dict(request.get("variables") or {})
        variables |= variables.get("input") or {}
        with self._lock:
            self.asked.append(name)
            if name in self.operations:
                return self.operations[name](variables)
            if name not in HARMLESS:
                self.unknown.append(name)
            return {}

    def receive(self, key: Key, post: Json) -> Json:
        """Stores a post of a run's rows where its offsets say, so that one which comes twice leaves its rows once."""
        with self._lock:
            self.asked.append("file_stream")
            run = self.runs[key]
            for name, chunk in (post.get("files") or {}).items():
                offset, lines = chunk.get("offset", 0), chunk["content"]
                match name:
                    case "wandb-history.jsonl":
                        _place(run.history, offset, [json.loads(line) for line in lines], {})
                    case "wandb-events.jsonl":
                        _place(run.events, offset, [json.loads(line) for line in lines], {})
                    case "output.log":
                        _place(run.output, offset, lines, "")
                    case "wandb-summary.json":
                        run.summary = json.loads(lines[-1])
                    case _:
                        self.unknown.append(f"rows of {name}")
            run.state, run.exit_code = "running", None
            run.preempting = run.preempting or bool(post.get("preempting"))
            if post.get("complete"):
                run.exit_code = post["exitcode"]
                run.state = "finished" if run.exit_code == 0 else "failed"
            if self.lost_answers and "wandb-history.jsonl" in (post.get("files") or {}):
                self.lost_answers -= 1
                raise Refusal("lost on the way", HTTPStatus.SERVICE_UNAVAILABLE)
            return {}

    def store(self, number: int, body: bytes) -> None:
        """Keeps an upload; what has not the promised checksum is refused."""
        with self._lock:
            files, name, checksum = self._storage[number]
            if checksum not in (None, md5(body)):
                raise Refusal(f"{name} has not the checksum {checksum}")
            files[name] = body

    def load(self, number: int) -> bytes:
        """Returns what was uploaded."""
        with self._lock:
            files, name, _ = self._storage[number]
            return files[name]

    def _url_of(self, files: dict[str, bytes], name: str, checksum: str | None = None) -> str:
        """Returns a new address of one file, to upload to and to download from."""
        self._storage.append((files, name, checksum))
        return f"{self.url}/storage/{len(self._storage) - 1}/{quote(name)}"

    def _file_node(self, files: dict[str, bytes], name: str) -> Json:
        url, body = self._url_of(files, name), files[name]
        return {
            **{"__typename": "File", "id": node_id("File", len(self._storage)), "name": name, "displayName": name},
            **{"url": url, "directUrl": url, "sizeBytes": len(body), "md5": md5(body), "digest": md5(body)},
            **{"mimetype": mimetypes.guess_type(name)[0], "updatedAt": now(), "storagePath": name},
        }

    def _viewer(self, _: Json) -> Json:
        names = {name: ENTITY for name in ("name", "username", "entity")}
        rest: Json = {"email": "", "admin": False, "flags": "{}", "deletedAt": None}
        groups = {"teams": connection([{"name": ENTITY}]), "apiKeys": connection([])}
        return {"viewer": {"id": node_id("User", 1), **names, **rest, **groups}}

    def _in_project(self, variables: Json, **content: Any) -> Json:
        """Returns the project that is asked about, with some content; none where nothing was ever sent to it."""
        entity, project, _ = _key(variables)
        known = any(key[:2] == (entity, project) for key in (*self.runs, *self.sweeps))
        return {"project": project_node(entity, project) | content if known else None}

    # Runs

    def _known_run(self, variables: Json) -> Run:
        key = _key(variables, "name", "run", "runName")
        if key not in self.runs:
            raise Refusal(f"no run {'/'.join(key)}", HTTPStatus.NOT_FOUND)
        return self.runs[key]

    def _upsert_run(self, variables: Json) -> Json:
        key = _key(variables, "name")
        if variables.get("id"):
            key = next(key for key, run in self.runs.items() if run.node_id == variables["id"])
        inserted = key not in self.runs
        if inserted:
            number = len(self.runs) + 1
            self.runs[key] = Run(*key, number, f"loopback-{number}")
        run = self.runs[key]
        attributes = {"displayName": "display_name", "groupName": "group", "jobType": "job_type"}
        for name in (*attributes, "display_name", "notes", "program", "state", "sweep", "tags"):
            if variables.get(name) is not None:  # none means: leave it
                setattr(run, attributes.get(name, name), variables[name])
        if variables.get("config") is not None:
            run.config = {name: entry["value"] for name, entry in json.loads(variables["config"]).items()}
            run.wandb_config = run.config.pop("_wandb", {})
        if variables.get("summaryMetrics") is not None:
            run.summary = json.loads(variables["summaryMetrics"])
        return {"upsertBucket": {"bucket": run.node(), "inserted": inserted}}

    def _resume_status(self, variables: Json) -> Json:
        run = self.runs.get(_key(variables, "name"))
        project = project_node(*_key(variables)[:2])
        return {"model": project | {"bucket": None if run is None else run.node()}}

    def _create_run_files(self, variables: Json) -> Json:
        run = self._known_run(variables)
        files = [{"name": name, "uploadUrl": self._url_of(run.files, name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": run.node_id, "uploadHeaders": [], "files": files}}

    def _run(self, variables: Json) -> Json:
        run = self.runs.get(_key(variables, "name", "run"))
        return self._in_project(variables, run=None if run is None else run.node())

    def _runs_of(self, entity: str, project: str, wanted: Json) -> list[Run]:
        return [run for key, run in self.runs.items() if key[:2] == (entity, project) and run.matches(wanted)]

    def _list_runs(self, variables: Json) -> Json:
        wanted, order = json.loads(variables.get("filters") or "{}"), variables.get("order") or "+created_at"
        runs = self._runs_of(*_key(variables)[:2], wanted)
        having = [run for run in runs if run.attribute(order.lstrip("+-")) is not None]
        having.sort(key=lambda run: run.attribute(order.lstrip("+-")), reverse=order.startswith("-"))
        nodes = [run.node() for run in having + [run for run in runs if run not in having]]
        return self._in_project(variables, runCount=len(runs), runs=connection(nodes, variables))

    def _list_run_files(self, variables: Json) -> Json:
        files = self._known_run(variables).files
        pattern = (variables.get("pattern") or "%").replace("%", "*").replace("_", "?")
        names = [name for name in variables.get("fileNames") or sorted(files) if name in files]
        nodes = [self._file_node(files, name) for name in names if fnmatch.fnmatchcase(name, pattern)]
        return self._in_project(variables, run={"fileCount": len(files), "files": connection(nodes, variables)})

    def _full_history(self, variables: Json) -> Json:
        """Answers with evenly chosen rows where there are more than asked for: not all rows, as its name has it."""
        run, most = self._known_run(variables), variables.get("samples") or 500
        chosen = {"history": _thin(run.history, most), "events": _thin(run.events, most)}
        return self._in_project(variables, run={name: [text(row) for row in rows] for name, rows in chosen.items()})

    def _sampled_history(self, variables: Json) -> Json:
        """Answers every specification with the rows that have all of its keys, and nothing else of them."""
        history, samples = self._known_run(variables).history, []
        for spec in map(json.loads, variables.get("specs") or [variables["spec"]]):
            rows = _between(history, spec.get("minStep", 0), spec.get("maxStep", math.inf))
            rows = [{key: lookup(row, key) for key in spec["keys"]} for row in rows]
            samples.append(_thin([row for row in rows if None not in row.values()], spec.get("samples", 500)))
        return self._in_project(variables, run={"sampledHistory": sayable(samples)})

    def _no_parquet_history(self, variables: Json) -> Json:
        """Answers that no rows lie in files, so that the client asks for pages of them."""
        return self._in_project(variables, run={"parquetHistory": {"parquetUrls": [], "liveData": []}})

    def _history_page(self, variables: Json) -> Json:
        rows = _between(self._known_run(variables).history, int(variables["minStep"]), int(variables["maxStep"]))
        return self._in_project(variables, run={"history": [text(row) for row in rows[: variables["pageSize"]]]})

    # Artifacts

    def _artifact(self, variables: Json) -> Artifact:
        name = first_of(variables, "artifactID", "id", "clientID")
        if name not in self._by_id:
            raise Refusal(f"no artifact {name}", HTTPStatus.NOT_FOUND)
        return self._by_id[name]

    def _find_artifact(self, variables: Json) -> Artifact | None:
        entity, project, name = _key(variables, "name")
        collection = self.artifacts.get((entity, project, name.partition(":")[0]))
        return None if collection is None else collection.find(name.partition(":")[2] or "latest")

    def _artifact_type(self, variables: Json) -> Json:
        found = self._find_artifact(variables)
        return self._in_project(variables, artifact=None if found is None else found.node())

    def _create_artifact(self, variables: Json) -> Json:
        """Makes an artifact to be filled and committed, unless the collection has one of the same content."""
        run = self.runs.get(_key(variables, "runName"))
        entity, project, name = _key(variables, "artifactCollectionName")
        name, kind = name or variables["artifactCollectionNames"][0], variables["artifactTypeName"]
        collection = self.artifacts.setdefault((entity, project, name), Collection(entity, project, name, kind))
        if collection.type != kind:
            raise Refusal(f"artifact {name} is of type {collection.type}, not {kind}")
        aliases = [alias["alias"] for alias in variables.get("aliases") or []]
        artifact = next((one for one in collection.versions if one.digest == variables["digest"]), None)
        latest = collection.versions[-1] if collection.versions else None
        if artifact is not None:
            collection.move(aliases, artifact)
        else:
            told = json.loads(variables.get("metadata") or "{}"), variables.get("description")
            number = node_id("Artifact", len(self._by_id) + 1)
            artifact = Artifact(number, collection, variables["digest"], *told, aliases, run)
            self._by_id[number] = artifact
        if variables.get("clientID"):
            self._by_id[variables["clientID"]] = artifact
        if run is not None and artifact not in run.logged_artifacts:
            run.logged_artifacts.append(artifact)
        sequence = collection.node() | {"latestArtifact": latest and latest.node()}
        return {"createArtifact": {"artifact": artifact.node() | {"artifactSequence": sequence}}}

    def _create_manifest(self, variables: Json) -> Json:
        artifact = self._artifact(variables)
        url = self._url_of(artifact.manifest, "wandb_manifest.json") if variables["includeUpload"] else None
        file: Json = {"id": artifact.id, "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact.id, "file": file}}}

    def _create_artifact_files(self, variables: Json) -> Json:
        nodes = []
        for file in variables["artifactFiles"]:
            artifact, name = self._artifact(file), file["name"]
            artifact.md5[name] = file["md5"]
            url = self._url_of(artifact.files, name, file["md5"])
            nodes.append({"storagePath": name, "uploadUrl": url, "uploadHeaders": [], "artifact": {"id": artifact.id}})
        return {"createArtifactFiles": {"files": connection(nodes)}}

    def _commit_artifact(self, variables: Json) -> Json:
        artifact = self._artifact(variables)
        missing = artifact.md5.keys() - artifact.files.keys()
        if missing or not artifact.manifest:
            raise Refusal(f"committed before the upload of {', '.join(sorted(missing)) or 'its manifest'}")
        if artifact.version is None:
            artifact.version = len(artifact.collection.versions)
            artifact.collection.versions.append(artifact)
            artifact.collection.move(artifact.requested, artifact)
        return {"commitArtifact": {"artifact": artifact.node()}}

    def _use_artifact(self, variables: Json) -> Json:
        artifact, run = self._artifact(variables), self._known_run(variables)
        if artifact not in run.used_artifacts:
            run.used_artifacts.append(artifact)
            artifact.used_by.append(run)
        return {"useArtifact": {"artifact": artifact.node()}}

    def _update_artifact(self, variables: Json) -> Json:
        artifact = self._artifact(variables)
        artifact.metadata = json.loads(variables["metadata"])
        artifact.description = variables.get("description")
        answer = {"artifact": artifact.node()}
        return {"result": answer, "updateArtifact": answer}

    def _change_aliases(self, variables: Json, added: bool) -> Json:
        artifact, aliases = self._artifact(variables), {alias["alias"] for alias in variables["aliases"]}
        if added:
            artifact.collection.move(aliases, artifact)
        else:
            artifact.aliases -= aliases
        return {"result": {"success": True}}

    def _manifest(self, variables: Json) -> Json:
        url = self._url_of(self._artifact(variables).manifest, "wandb_manifest.json")
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def _membership(self, variables: Json) -> Json:
        found = self._find_artifact(variables)
        return self._in_project(variables, artifactCollectionMembership=None if found is None else found.membership())

    def _list_artifact_files(self, variables: Json) -> Json:
        name = f"{variables['collection']}:{variables['alias']}"
        files = self.artifact("/".join([*_key(variables)[:2], name])).files
        names = [path for path in variables.get("fileNames") or files if path in files]
        member = {"files": connection([self._file_node(files, path) for path in names], variables)}
        collection = {"__typename": "ArtifactSequence", "artifactMembership": member}
        return self._in_project(variables, artifactCollection=collection)

    def _lineage(self, variables: Json) -> Json:
        artifact = self._artifact(variables)
        creator = None if artifact.logged_by is None else artifact.logged_by.node()
        return {"artifact": {"createdBy": creator, "usedBy": connection([run.node() for run in artifact.used_by])}}

    def _artifacts_of_run(self, variables: Json, which: str) -> Json:
        artifacts: list[Artifact] = getattr(self._known_run(variables), which)
        nodes = [one.node() for one in artifacts if one.version is not None]
        return self._in_project(variables, run={"artifacts": connection(nodes, variables)})

    def _list_versions(self, variables: Json) -> Json:
        """Answers with all versions of a collection, newest first."""
        collection = self.artifacts.get(_key(variables, "collection"))
        nodes = [] if collection is None else [one.node() for one in collection.versions[::-1]]
        page = connection(nodes, variables)
        page["edges"] = [edge | {"version": f"v{edge['node']['versionIndex']}"} for edge in page["edges"]]
        found = {"__typename": "ArtifactSequence", "artifacts": page}
        return self._in_project(variables, artifactType={"artifactCollection": found})

    def _list_types(self, variables: Json) -> Json:
        kinds = sorted({one.type for key, one in self.artifacts.items() if key[:2] == _key(variables)[:2]})
        same: Json = {"__typename": "ArtifactType", "description": None, "createdAt": now()}
        nodes = [{"id": node_id("ArtifactType", kind), "name": kind, **same} for kind in kinds]
        return self._in_project(variables, artifactTypes=connection(nodes, variables))

    def _list_collections(self, variables: Json) -> Json:
        found = [one for key, one in self.artifacts.items() if key[:2] == _key(variables)[:2]]
        nodes = [one.node() for one in found if one.type == variables["type"]]
        return self._in_project(variables, artifactType={"artifactCollections": connection(nodes, variables)})

    # Sweeps

    def _upsert_sweep(self, variables: Json) -> Json:
        sweep = next((one for one in self.sweeps.values() if one.node_id == variables["id"]), None)
        if sweep is None:
            entity, project, _ = _key(variables)
            sweep = Sweep(entity, project, f"sweep{len(self.sweeps) + 1}", variables["config"])
            self.sweeps[entity, project, sweep.id] = sweep
        elif variables.get("config"):
            sweep.configure(variables["config"])
        sweep.state = variables.get("state") or sweep.state
        asked = [{"sweep": sweep.id}, *map(json.loads, filter(None, [variables.get("priorRunsFilters")]))]
        for run in self._runs_of(sweep.entity, sweep.project, {"$or": asked}):
            sweep.adopt(run)
        return {"upsertSweep": {"sweep": sweep.node(), "configValidationWarnings": []}}

    def _sweep(self, variables: Json) -> Json:
        sweep = self.sweeps.get(_key(variables, "sweep", "name"))
        if sweep is None:
            return self._in_project(variables, sweep=None)
        runs = [run.node() for run in self.runs.values() if run.sweep == sweep.id]
        return self._in_project(variables, sweep=sweep.node() | {"runs": connection(runs), "runCount": len(runs)})

    def _create_agent(self, variables: Json) -> Json:
        sweep = self.sweeps[_key(variables, "sweep")]
        if sweep.state != "RUNNING":
            raise Refusal(f"sweep {sweep.id} is not running")
        agent = node_id("Agent", len(self._agents) + 1)
        self._agents[agent] = sweep
        return {"createAgent": {"agent": {"id": agent}}}

    def _heartbeat(self, variables: Json) -> Json:
        """Commands what is to stop, or the next run of the plan where none is running, or to leave for want of one."""
        sweep, running = self._agents[variables["id"]], json.loads(variables["runState"])
        commands = [Json(type="stop", run_id=run_id) for run_id in running if self._stops(sweep, run_id)]
        sweep.stopped.update(command["run_id"] for command in commands)
        if not running and sweep.plan:
            trial = Trial(f"{sweep.id}-{len(sweep.trials) + 1}", variables["id"], sweep.plan.pop(0))
            sweep.trials.append(trial)
            values = {name: {"value": value} for name, value in trial.values.items()}
            program = sweep.settings.get("program")
            commands.append({"type": "run", "run_id": trial.run_id, "program": program, "args": values})
        elif not running:
            commands.append({"type": "exit"})
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _stops(self, sweep: Sweep, run_id: str) -> bool:
        run = self.runs.get((sweep.entity, sweep.project, run_id))  # none before it began
        return run is not None and sweep.stops(run)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, loopback: LoopbackServer, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Connection)
        self.loopback = loopback
        self.serves = True
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def break_off(self) -> None:
        """Ends what goes over the open connections."""
        self.serves = False
        for request in tuple(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a connection that was broken off, at whichever end."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    """One connection of a client, which sends many requests over it."""

    server: _HttpServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: the second of two would wait for the client's word on the first

    def do_GET(self) -> None:
        self._exchange()

    def do_PUT(self) -> None:
        self._exchange()

    def do_POST(self) -> None:
        self._exchange()

    def _exchange(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = HTTPStatus.OK
        try:
            self.server.loopback.disturb()
            content = self._content(body)
        except ConnectionError:
            self.close_connection = True
            return
        except Refusal as refusal:
            status, content = refusal.status, json.dumps({"errors": [{"message": str(refusal)}]}).encode()
        except Exception as error:  # the client says only that it got an error; the test must see which
            self.server.loopback.unknown.append(f"{self.command} {self.path} {body[:200]!r}: {error!r}")
            status, content = HTTPStatus.BAD_REQUEST, json.dumps({"errors": [{"message": repr(error)}]}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _content(self, body: bytes) -> bytes:
        loopback, path = self.server.loopback, urlsplit(self.path).path
        match [self.command, *(unquote(part) for part in path.strip("/").split("/"))]:
            case ["PUT", "storage", number, *_]:
                loopback.store(int(number), body)
                return b""
            case ["GET", "storage", number, *_]:
                return loopback.load(int(number))
            case ["POST", "graphql"]:
                self._check_key()
                return json.dumps({"data": loopback.answer(json.loads(body))}, allow_nan=False).encode()
            case ["POST", "files", entity, project, run_id, "file_stream"]:
                self._check_key()
                return json.dumps(loopback.receive((entity, project, run_id), json.loads(body))).encode()
        loopback.asked.append(path)
        if path not in HARMLESS:
            loopback.unknown.append(f"{self.command} {path}")
        raise Refusal(f"nothing at {path}", HTTPStatus.NOT_FOUND)

    def _check_key(self) -> None:
        expected = "Basic " + base64.b64encode(f"api:{API_KEY}".encode()).decode()
        if self.server.loopback.rejects_key or self.headers.get("Authorization") != expected:
            raise Refusal("this key opens nothing here", HTTPStatus.UNAUTHORIZED)

    def log_message(self, format: str, *values: object) -> None:
        """Says nothing: what was asked is in `LoopbackServer.asked`."""


def _key(variables: Json, *names: str) -> Key:
    """Returns entity, project and one more name. `wandb sync` sends an empty entity, others none at all."""
    entity, project = first_of(variables, "entity", "entityName"), first_of(variables, "project", "projectName")
    return entity or ENTITY, project or "uncategorized", first_of(variables, *names) or ""


def _place(lines: list[Any], offset: int, content: Sequence[Any], blank: Any) -> None:
    lines += [blank] * (offset - len(lines))
    lines[offset : offset + len(content)] = content


def _between(history: Iterable[Json], first: float, end: float) -> list[Json]:
    return [row for row in history if first <= row.get("_step", -1) < end]


def _thin(rows: list[Json], most: int) -> list[Json]:
    return rows[:: math.ceil(len(rows) / most) or 1]
