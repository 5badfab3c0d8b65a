"""The loopback server takes what wandb's real client sends, online and from `wandb sync`, and gives it back unchanged.

The client runs in processes of its own, which call the first functions of this file: what they log, the tests expect.
"""

import hashlib
import json
import math
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from loopback import API_KEY, LoopbackServer
from loopback_records import Run, combinations

PROJECT = "loopback/project"
CONFIG = {"lr": 0.1, "seed": 3, "name": "a <b>", "flag": True, "none": None, "sizes": [1, 2], "nested": {"decay": 1e-5}}
NUMBERS = [0.1, 1 / 3, math.nan, math.inf, -math.inf, 1e-300, sys.float_info.max]
ROWS = [{"loss": loss, "count": 2**60 + row, "deep": {"er": row}} for row, loss in enumerate(NUMBERS)]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
COLUMNS: list[str | int] = ["id", "image", "confidence"]
CONTENTS = [bytes(range(256)), bytes(range(256)) * 40]

# The module's own opener may have got a proxy from a test before.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def log_run(run_id: str) -> None:
    """Logs one of everything: rows, an image, a table, two versions of a file, and a table in an artifact."""
    import wandb

    run = wandb.init(
        project="project",
        id=run_id,
        name="first",
        group="seeds",
        job_type="train",
        tags=["a", "b"],
        notes="a note",
        config=CONFIG,
    )
    for row in ROWS:
        run.log(row)
    print("a line on the console")
    run.log({"picture": wandb.Image(IMAGES[0], caption="first")})
    table = wandb.Table(columns=COLUMNS)
    for index, image in enumerate(IMAGES):
        table.add_data(f"test/{index}", wandb.Image(image), index / 7)
    run.log({"examples": table})
    for index, content in enumerate(CONTENTS):
        Path("model.bin").write_bytes(content)
        artifact = wandb.Artifact(f"model-{run_id}", type="model", metadata={"accuracy": index / 3})
        artifact.add_file("model.bin")
        run.log_artifact(artifact, aliases=["best", f"epoch-{index}"])
    artifact = wandb.Artifact(f"tables-{run_id}", type="evaluation")
    artifact.add(table, "examples")
    run.log_artifact(artifact)
    run.summary.update({"best": 0.75, "worst": math.inf})
    run.finish()


def log_more_runs() -> None:
    """Uses an artifact, logs the same content again, resumes a run, and fails."""
    import wandb

    with wandb.init(project="project", id="evaluation", job_type="evaluate", config={"lr": 0.2}) as run:
        used = run.use_artifact("model-online:latest")
        Path("model.bin").write_bytes(Path(used.download(), "model.bin").read_bytes())
        artifact = wandb.Artifact("model-online", type="model")
        artifact.add_file("model.bin")
        run.log_artifact(artifact, aliases=["evaluated"]).wait()
        used.aliases.append("production")
        used.aliases.remove("best")
        used.description = "the one to use"
        used.save()
    for rows in ([0, 1, 2], [3, 4]):
        with wandb.init(project="project", id="pieces", resume="allow", config={"lr": 0.3}) as run:
            for row in rows:
                run.log({"row": row})
    wandb.init(project="project", id="broken").finish(exit_code=3)


def read_back(run_id: str) -> None:
    """Prints what W&B's public interface says about a run and its artifacts."""
    import wandb

    api = wandb.Api()
    run = api.run(f"{PROJECT}/{run_id}")
    run.file("wandb-metadata.json").download("files")
    told = {name: getattr(run, name) for name in ("config", "state", "name", "group", "tags", "notes", "sweep")}
    told |= {"job_type": run.job_type, "summary": dict(run.summary_metrics), "last_step": run.lastHistoryStep}
    told["history"] = run.history(pandas=False)
    told["some"] = run.history(samples=3, pandas=False)
    told["events"] = len(run.history(stream="system", pandas=False))
    told["scan"] = list(run.scan_history())
    told["pages"] = list(run.scan_history(page_size=2))
    told["losses"] = list(run.scan_history(keys=["loss"]))
    told["sampled"] = run.history(keys=["count", "deep.er"], pandas=False)
    told["files"] = sorted(file.name for file in run.files(per_page=2))
    told["images"] = sorted(file.name for file in run.files(pattern="media/images/%"))
    told["downloaded"] = Path("files", "wandb-metadata.json").read_bytes().hex()
    told["logged"] = sorted(artifact.name for artifact in run.logged_artifacts(per_page=2))
    told["models"] = {}
    for version in ("v0", "v1"):
        artifact = api.artifact(f"{PROJECT}/model-{run_id}:{version}")
        root = artifact.download(version)
        artifact.verify(root)
        logged_by = artifact.logged_by()
        told["models"][version] = {
            **{"bytes": Path(root, "model.bin").read_bytes().hex(), "aliases": sorted(artifact.aliases)},
            **{"files": [file.name for file in artifact.files()]},
            **{"metadata": artifact.metadata, "type": artifact.type, "size": artifact.size},
            **{"logged_by": logged_by and logged_by.id, "used_by": [user.id for user in artifact.used_by()]},
        }
    told["latest"] = api.artifact(f"{PROJECT}/model-{run_id}:latest").version
    told["versions"] = [artifact.version for artifact in api.artifacts("model", f"{PROJECT}/model-{run_id}")]
    told["exist"] = [api.artifact_exists(f"{PROJECT}/{name}") for name in (f"model-{run_id}:v2", "other:latest")]
    for name, path in {"table": f"run-{run_id}-examples", "table in artifact": f"tables-{run_id}"}.items():
        table = api.artifact(f"{PROJECT}/{path}:latest").get("examples")
        told[name] = [table.columns, *([key, np.asarray(image.image).tolist(), x] for key, image, x in table.data)]
    print(json.dumps(told))


def list_runs() -> None:
    """Prints what is found in a project."""
    import wandb

    api = wandb.Api()
    questions: list[dict[str, Any]] = [
        *({}, {"config.lr": 0.1}, {"state": {"$ne": "finished"}}, {"tags": "a"}, {"display_name": {"$regex": "^fir"}}),
        *({"$or": [{"config.lr": {"$gt": 0.2}}, {"job_type": {"$in": ["evaluate"]}}]}, {"summary_metrics.best": 0.75}),
    ]
    told = {
        "answers": [[run.id for run in api.runs(PROJECT, filters=question, per_page=2)] for question in questions],
        "number": len(api.runs(PROJECT)),
        "by lr": [run.id for run in api.runs(PROJECT, order="-config.lr")],
        "users": [run.id for run in api.run(f"{PROJECT}/evaluation").used_artifacts()[0].used_by()],
        "collections": sorted(one.name for kind in api.artifact_types(PROJECT) for one in kind.collections()),
        "account": [api.viewer.username, api.default_entity, api.project("project", "loopback").entity_name],
    }
    print(json.dumps(told))


def verify_damaged() -> None:
    """Prints what the client says to bytes that are not those of the manifest."""
    import wandb

    artifact = wandb.Api().artifact(f"{PROJECT}/model-online:v0")
    try:
        artifact.verify(artifact.download("damaged"))
    except ValueError as error:
        print(error)


def train_in_sweep() -> None:
    """Is what an agent starts: logs the value that it was given, and what its sweep says."""
    import wandb

    with wandb.init() as run:
        sweep = wandb.Api().sweep(f"loopback/search/{run.sweep_id}")  # type: ignore[no-untyped-call]
        run.log({"doubled": run.config["lr"] * 2, "method": sweep.config["method"]})


@dataclass(frozen=True)
class Client:
    """Processes with wandb's client in them, which know of no server but one."""

    server: LoopbackServer
    environment: dict[str, str]

    def command(self, folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Returns what a command left that ran in a folder, its home."""
        folder.mkdir(exist_ok=True)
        paths = {"HOME": str(folder), "PYTHONPATH": str(Path(__file__).parent)}
        environment = {**self.environment, **paths, **self.server.environment(), **variables}
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=folder, env=environment, check=False, **options)

    def call(self, folder: Path, call: str, **variables: str) -> str:
        """Returns what a function of this file printed in a process of its own."""
        done = self.command(folder, sys.executable, "-c", f"import test_loopback; test_loopback.{call}", **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def client(clean_environment: dict[str, str]) -> Iterator[Client]:
    """A client, and the server that it speaks to."""
    with LoopbackServer() as server:
        yield Client(server, clean_environment)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it each process has its home: nothing that one read can come out of another's cache."""
    return tmp_path_factory.mktemp("loopback")


@pytest.fixture(scope="module")
def online(client: Client, root: Path) -> Run:
    """The run that was logged online. The first answer to its rows was lost, so that they came twice."""
    client.server.lost_answers = 1
    client.call(root / "online", "log_run('online'); test_loopback.log_more_runs()")
    return client.server.runs["loopback", "project", "online"]


@pytest.fixture(scope="module")
def synced(client: Client, online: Run, root: Path) -> Run:
    """The same run, logged offline and brought up afterwards."""
    asked = len(client.server.asked)
    client.call(root / "offline", "log_run('offline')", WANDB_MODE="offline")
    assert len(client.server.asked) == asked
    [folder] = (root / "offline" / "wandb").glob("offline-run-*")
    done = client.command(root / "offline", str(Path(sys.executable).with_name("wandb")), "sync", str(folder))
    assert done.returncode == 0, done.stderr
    return client.server.runs["loopback", "project", "offline"]


@pytest.fixture(scope="module", params=["online", "offline"])
def run(request: pytest.FixtureRequest, online: Run, synced: Run) -> Run:
    """Either run."""
    return {"online": online, "offline": synced}[request.param]


@pytest.fixture(scope="module")
def read(client: Client, run: Run, root: Path) -> dict[str, Any]:
    """What W&B's public interface says about either run."""
    told: dict[str, Any] = json.loads(client.call(root / f"read-{run.id}", f"read_back('{run.id}')").splitlines()[-1])
    return told


def as_text(value: Any) -> Any:
    """Returns a value with W&B's words for the numbers that JSON lacks."""
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(str(value), value)


# What arrives


def test_rows_arrive_once_and_to_the_last_bit(run: Run, client: Client) -> None:
    assert client.server.lost_answers == 0
    rows = [{key: row[key] for key in row if key in ROWS[0]} for row in run.history]
    assert repr([sorted(row.items()) for row in rows[: len(ROWS)]]) == repr([sorted(row.items()) for row in ROWS])
    assert [row["_step"] for row in run.history] == list(range(len(ROWS) + 2))


def test_settings_arrive_with_their_types(run: Run) -> None:
    assert run.config == CONFIG and repr(run.config["flag"]) == "True"
    assert (run.display_name, run.group, run.job_type, run.notes) == ("first", "seeds", "train", "a note")
    assert run.tags == ["a", "b"]
    assert (run.state, run.exit_code) == ("finished", 0)


def test_summary_holds_the_last_row_and_what_was_set(run: Run) -> None:
    assert run.summary["best"] == 0.75 and run.summary["count"] == ROWS[-1]["count"]
    assert run.summary["worst"] == math.inf


def test_files_and_media_arrive_as_they_are_on_disk(run: Run, root: Path) -> None:
    [folder] = (root / run.id / "wandb").glob(f"*run-*-{run.id}")
    on_disk = {path.relative_to(folder / "files").as_posix(): path for path in (folder / "files").rglob("*.*")}
    media = {name for name in on_disk if name.startswith("media/")}
    assert {name.split("/")[1] for name in media} == {"images", "table"}
    assert all(run.files[name] == on_disk[name].read_bytes() for name in media | {"wandb-metadata.json"})
    picture = run.history[len(ROWS)]["picture"]
    assert hashlib.sha256(run.files[picture["path"]]).hexdigest() == picture["sha256"]


def test_the_console_arrives(run: Run) -> None:
    assert sum(line.endswith(" a line on the console") for line in run.output) == 1


def test_an_artifact_holds_exactly_its_files(run: Run, client: Client) -> None:
    versions = client.server.artifacts["loopback", "project", f"model-{run.id}"].versions
    assert [version.files for version in versions] == [{"model.bin": content} for content in CONTENTS]
    assert [version.metadata for version in versions] == [{"accuracy": 0}, {"accuracy": 1 / 3}]
    assert [version.logged_by for version in versions] == [run, run]


def test_aliases_move_to_the_newer_version(synced: Run, client: Client) -> None:
    old, new = client.server.artifacts["loopback", "project", "model-offline"].versions
    assert (old.aliases, new.aliases) == ({"epoch-0"}, {"epoch-1", "best", "latest"})
    assert client.server.artifact("loopback/project/model-offline:best") is new


def test_runs_know_what_they_used_and_logged(online: Run, client: Client) -> None:
    evaluation = client.server.runs["loopback", "project", "evaluation"]
    assert [artifact.name for artifact in evaluation.used_artifacts] == ["model-online:v1"]
    assert client.server.artifact("loopback/project/model-online:latest").used_by == [evaluation]
    names = ["model-online:v0", "model-online:v1", "run-online-examples:v0", "tables-online:v0"]
    assert sorted(artifact.name for artifact in online.logged_artifacts) == names


def test_known_content_is_no_new_version(online: Run, client: Client) -> None:
    assert len(client.server.artifacts["loopback", "project", "model-online"].versions) == len(CONTENTS)
    artifact = client.server.artifact("loopback/project/model-online:v1")
    assert artifact.aliases == {"epoch-1", "latest", "evaluated", "production"}  # "best" was taken from it
    assert artifact.description == "the one to use" and artifact.metadata == {"accuracy": 1 / 3}


def test_a_resumed_run_goes_on_after_its_last_row(online: Run, client: Client) -> None:
    history = client.server.runs["loopback", "project", "pieces"].history
    assert [(row["_step"], row["row"]) for row in history] == [(row, row) for row in range(5)]


def test_a_failed_run_is_told_by_its_exit_code(online: Run, client: Client) -> None:
    broken = client.server.runs["loopback", "project", "broken"]
    assert (broken.state, broken.exit_code) == ("failed", 3)


# What is read back


def test_every_row_is_read_back(read: dict[str, Any], run: Run) -> None:
    expected = [{key: as_text(value) for key, value in row.items()} for row in run.history]
    assert read["scan"] == read["pages"] == read["history"] == expected
    assert read["losses"] == [{"_step": step, "loss": as_text(loss)} for step, loss in enumerate(NUMBERS)]
    assert read["sampled"] == [{"_step": step, "count": 2**60 + step, "deep.er": step} for step in range(len(ROWS))]
    assert read["some"] == expected[::3] and read["events"] == len(run.events) > 0
    assert read["last_step"] == len(ROWS) + 1


def test_what_a_run_is_called_and_holds_is_read_back(read: dict[str, Any], run: Run) -> None:
    assert read["config"] == CONFIG
    assert read["summary"] == {key: as_text(value) for key, value in run.summary.items()}
    assert (read["name"], read["group"], read["job_type"], read["tags"]) == ("first", "seeds", "train", ["a", "b"])
    assert (read["notes"], read["state"], read["sweep"]) == ("a note", "finished", None)


def test_files_are_read_back(read: dict[str, Any], run: Run) -> None:
    assert read["files"] == sorted(run.files)
    assert read["images"] == [run.history[len(ROWS)]["picture"]["path"]]
    assert bytes.fromhex(read["downloaded"]) == run.files["wandb-metadata.json"]


def test_artifacts_are_read_back_to_the_byte(read: dict[str, Any], run: Run) -> None:
    assert [bytes.fromhex(model["bytes"]) for model in read["models"].values()] == CONTENTS
    assert [model["size"] for model in read["models"].values()] == [len(content) for content in CONTENTS]
    assert [model["metadata"] for model in read["models"].values()] == [{"accuracy": 0}, {"accuracy": 1 / 3}]
    assert {(model["type"], model["logged_by"]) for model in read["models"].values()} == {("model", run.id)}
    assert read["models"]["v0"]["aliases"] == ["epoch-0"]
    assert {"epoch-1", "latest"} <= {*read["models"]["v1"]["aliases"]}
    assert [model["files"] for model in read["models"].values()] == [["model.bin"]] * 2
    assert read["models"]["v1"]["used_by"] == (["evaluation"] if run.id == "online" else [])
    assert (read["latest"], read["versions"], read["exist"]) == ("v1", ["v1", "v0"], [False, False])
    assert read["logged"] == sorted(artifact.name for artifact in run.logged_artifacts)


@pytest.mark.parametrize("table", ["table", "table in artifact"])
def test_a_table_is_read_back_with_its_images(read: dict[str, Any], table: str) -> None:
    columns, *rows = read[table]
    assert columns == COLUMNS
    assert [(name, confidence) for name, _, confidence in rows] == [(f"test/{row}", row / 7) for row in range(3)]
    assert np.array_equal([image for _, image, _ in rows], IMAGES)


def test_runs_are_found_by_what_they_hold(client: Client, synced: Run, root: Path) -> None:
    told = json.loads(client.call(root / "list", "list_runs()").splitlines()[-1])
    everything, both = ["online", "evaluation", "pieces", "broken", "offline"], ["online", "offline"]
    assert told["answers"] == [everything, both, ["broken"], both, both, ["evaluation", "pieces"], both]
    assert told["number"] == len(everything)
    assert told["by lr"] == ["pieces", "evaluation", *both, "broken"]
    assert told["users"] == ["evaluation"]
    assert told["collections"] == [
        *("model-offline", "model-online", "run-offline-examples", "run-online-examples"),
        *("tables-offline", "tables-online"),
    ]
    assert told["account"] == ["loopback", "loopback", "loopback"]


def test_nothing_was_asked_that_the_server_does_not_know(client: Client, read: dict[str, Any]) -> None:
    assert client.server.unknown == []
    assert {"Viewer", "UpsertBucket", "file_stream", "CommitArtifact", "HistoryPage"} <= {*client.server.asked}


# What must not pass


def test_the_client_notices_damaged_bytes(client: Client, online: Run, root: Path) -> None:
    files = client.server.artifact("loopback/project/model-online:v0").files
    files["model.bin"] = files["model.bin"][::-1]
    said = client.call(root / "damaged", "verify_damaged()")
    files["model.bin"] = files["model.bin"][::-1]
    assert "model.bin" in said and "igest" in said


def post(server: LoopbackServer, query: str, key: str = API_KEY, **variables: Any) -> Any:
    """Returns the data of the answer to a GraphQL request."""
    passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
    passwords.add_password(None, server.url, "api", key, is_authenticated=True)
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
    body = json.dumps({"query": query, "variables": {"input": variables}}).encode()
    with opener.open(f"{server.url}/graphql", body) as answer:
        return json.loads(answer.read())["data"]


def test_an_upload_must_have_the_promised_checksum_and_be_complete() -> None:
    with LoopbackServer() as server:
        names = {"entityName": "e", "projectName": "p", "artifactCollectionName": "n", "artifactTypeName": "model"}
        artifact = post(server, "mutation CreateArtifact {}", **names, digest="d")["createArtifact"]["artifact"]["id"]
        file = {"artifactID": artifact, "name": "a", "md5": "kAFQmDzST7DWlj99KOF/cg=="}  # RFC 1321's md5 of "abc"
        answer = post(server, "mutation CreateArtifactFiles {}", artifactFiles=[file])
        url = answer["createArtifactFiles"]["files"]["edges"][0]["node"]["uploadUrl"]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            OPENER.open(urllib.request.Request(url, b"abd", method="PUT"))
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(server, "mutation CommitArtifact {}", artifactID=artifact)
        with OPENER.open(urllib.request.Request(url, b"abc", method="PUT")):
            assert OPENER.open(url).read() == b"abc"


def test_an_unknown_question_is_answered_and_noted() -> None:
    with LoopbackServer() as server:
        assert post(server, "query Weather { sun }") == {}
        assert server.unknown == ["Weather"]


def test_another_key_is_refused(client: Client, root: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        post(client.server, "query Viewer { viewer }", key="another")
    command = [sys.executable, "-c", "import wandb; wandb.init(project='project', id='stranger')"]
    done = client.command(root / "stranger", *command, WANDB_API_KEY="1" * 40)
    assert done.returncode == 1 and "CommError: this key opens nothing here" in done.stderr
    assert ("loopback", "project", "stranger") not in client.server.runs


# Sweeps


def test_an_agent_starts_the_planned_runs(client: Client, root: Path) -> None:
    child = [sys.executable, "-c", "import test_loopback; test_loopback.train_in_sweep()"]
    sweep = {"method": "grid", "parameters": {"lr": {"values": [0.25]}}, "command": child}
    folder, wandb = root / "sweep", str(Path(sys.executable).with_name("wandb"))
    folder.mkdir()
    (folder / "sweep.yaml").write_text(json.dumps(sweep))
    done = client.command(folder, wandb, "sweep", "--project", "search", "sweep.yaml")
    assert done.returncode == 0 and "loopback/search/sweep1" in done.stderr
    assert client.server.sweeps["loopback", "search", "sweep1"].plan == [{"lr": 0.25}]
    done = client.command(folder, wandb, "agent", "loopback/search/sweep1")
    assert done.returncode == 0, done.stderr
    run = client.server.runs["loopback", "search", "sweep1-1"]
    assert (run.sweep, run.state, run.config) == ("sweep1", "finished", {"lr": 0.25})
    assert [(row["doubled"], row["method"]) for row in run.history] == [(0.5, "grid")]
    assert client.server.unknown == []


def test_a_grid_is_every_combination_sorted_by_name_with_groups_last() -> None:
    group = {"parameters": {"deep": {"values": [True, None]}, "also": {"value": [1, 2]}}}
    plan = combinations({"a": group, "z": {"values": [1, 2]}, "b": {"value": 1e-5}})
    deep = [{"also": [1, 2], "deep": True}, {"also": [1, 2], "deep": None}]
    assert plan == [{"b": 1e-5, "z": number, "a": inner} for number in (1, 2) for inner in deep]
    assert [[*values] for values in plan] == [["b", "z", "a"]] * 4


def test_runs_that_are_put_into_a_sweep_are_not_tried_again(client: Client, synced: Run, root: Path) -> None:
    folder, wandb = root / "prior", str(Path(sys.executable).with_name("wandb"))
    nested = {"parameters": {"decay": {"values": [1e-5, 1e-4]}}}
    sweep = {"method": "grid", "parameters": {"lr": {"values": [0.1, 0.2]}, "nested": nested}}
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    done = client.command(folder, wandb, "sweep", "--project", "project", "-R", "offline", "-R", "none", "sweep.yaml")
    assert done.returncode == 0, done.stderr
    [made] = [sweep for key, sweep in client.server.sweeps.items() if key[1] == "project"]
    left = [(0.1, 1e-4), (0.2, 1e-5), (0.2, 1e-4)]
    assert made.plan == [{"lr": lr, "nested": {"decay": decay}} for lr, decay in left]
    runs = [run for run in client.server.runs.values() if run.sweep == made.id]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "parameters": {"lr": {"values": [0.1, 0.3, 0.4]}}}))
    path = f"loopback/project/{made.id}"
    done = client.command(folder, wandb, "sweep", "--update", path, "-R", "pieces", "sweep.yaml")
    assert done.returncode == 0, done.stderr
    assert made.plan == [{"lr": 0.4}] and client.server.runs["loopback", "project", "pieces"].sweep == made.id
    for run in [*runs, client.server.runs["loopback", "project", "pieces"]]:
        run.sweep = None  # other tests read them
    assert [run.id for run in runs] == ["offline"]
    assert client.server.unknown == []
