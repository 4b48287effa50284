"""The files in deploy/ fit the program: its options, its routes, and the time it takes to end."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from starlette.routing import Route

from llama_runtime.serve_cli import serve
from llama_runtime.server import ServerSettings, Service
from llama_runtime.server.app import app_of
from llama_runtime.server.command import CLOSE_SECONDS, LAST_SECONDS
from llama_runtime.server.keys import is_loopback, read_keys
from llama_runtime.server.shell import PROBE_PATHS

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
REST = LAST_SECONDS + CLOSE_SECONDS + 10  # after --shutdown-timeout, for those cut off and the step


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile's last stage, each with what follows it."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    last = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    return [(name, rest) for name, rest in found[last:]]


def unit() -> configparser.SectionProxy:
    # Comments take whole lines there, and a % is its own escape.
    parser = configparser.RawConfigParser(delimiters="=", strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "llama-run.service", encoding="utf-8")
    return parser["Service"]


def objects() -> tuple[Any, Any]:
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    deployment, service = yaml.safe_load_all(text)
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    return deployment, service


def pod() -> tuple[Any, Any]:
    """What a pod is, and its only container."""
    spec = objects()[0]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def of_docker() -> list[str]:
    rest = dict(instructions())
    entry = json.loads(rest["ENTRYPOINT"])  # as a list, or a shell would keep the signal
    assert entry == ["llama-run", "serve"]
    return [*entry, *json.loads(rest["CMD"])]


def of_kubernetes() -> list[str]:
    container = pod()[1]
    assert "command" not in container, "the image's own"
    return ["llama-run", "serve", *container["args"]]


def of_systemd() -> list[str]:
    program, *rest = shlex.split(unit()["ExecStart"])
    return [Path(program).name, *rest]


COMMANDS = pytest.mark.parametrize("command", [of_docker, of_kubernetes, of_systemd])


def parsed(command: list[str]) -> dict[str, Any]:
    """What a command says, as the program itself reads it."""
    assert command[:2] == ["llama-run", "serve"]
    return serve.make_context("serve", command[2:]).params


@COMMANDS
def test_the_program_takes_what_it_is_given(command: Any) -> None:
    params = parsed(command())
    assert params["api_key_file"] is not None
    assert not params["insecure"]
    assert params["port"] == 8000
    assert is_loopback(params["host"]) == (command is of_systemd)
    with pytest.raises(click.NoSuchOption):
        parsed([*command(), "--no-such-option"])


def test_everybody_waits_until_a_server_has_drained() -> None:
    spec, container = pod()
    (sleep, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    drain = parsed(of_kubernetes())["shutdown_timeout"]
    assert spec["terminationGracePeriodSeconds"] >= int(seconds) + drain + REST

    assert int(unit()["TimeoutStopSec"]) >= parsed(of_systemd())["shutdown_timeout"] + REST
    assert unit()["KillSignal"] == "SIGTERM"

    drain = parsed(of_docker())["shutdown_timeout"]
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    (given,) = re.findall(r"docker run .*--stop-timeout (\d+)", text)
    assert int(given) >= drain + REST
    assert dict(instructions())["STOPSIGNAL"] == "SIGTERM"


def test_probes_ask_routes_that_need_no_key() -> None:
    container = pod()[1]
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    # A server that drains or loads isn't ready, and is healthy: it must not be killed for it.
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    (port,) = container["ports"]
    assert port["containerPort"] == parsed(of_kubernetes())["port"]
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {port["name"]}

    health = dict(instructions())["HEALTHCHECK"]
    _, python = health.split(" CMD ")
    (url,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)'", json.loads(python)[-1])
    assert url == "/health"

    routes = app_of(Service(ServerSettings())).routes
    served = {route.path for route in routes if isinstance(route, Route)}
    assert {*paths.values(), url} <= served & set(PROBE_PATHS)


def test_a_service_finds_its_pods() -> None:
    deployment, service = objects()
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] == pod()[1]["ports"][0]["name"]


def test_what_a_pod_reads_is_mounted_and_its_keys_stay_secret(tmp_path: Path) -> None:
    spec, container = pod()
    params = parsed(of_kubernetes())
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    assert mounts[str(params["bundle"])]["readOnly"]
    keys = mounts[str(params["api_key_file"].parent)]
    assert keys["readOnly"]
    mode = volumes[keys["name"]]["secret"]["defaultMode"]
    assert mode & 0o040, "the group reads it, which is fsGroup: the owner is root"
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
    file = tmp_path / "keys"
    file.write_text("one\n")
    file.chmod(mode)
    assert read_keys(file) == ("one",)


def test_nothing_runs_as_root_or_may_become_it() -> None:
    spec, container = pod()
    user = dict(instructions())["USER"]
    context = spec["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert context["runAsNonRoot"]
    assert 0 not in (context["runAsUser"], context["runAsGroup"])
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"memory"} <= container["resources"]["limits"].keys()
    service = unit()
    assert service["Type"] == "exec"
    assert service["DynamicUser"] == service["NoNewPrivileges"] == service["ProtectHome"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    (name, _) = service["LoadCredential"].split(":")
    assert f"%d/{name}" in service["ExecStart"]


def test_the_image_is_made_of_what_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        source
        for rest in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for source in rest.split()[:-1]
    ]
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert allowed[0] == "*"
    assert sorted(f"!{source}" for source in copied) == sorted(
        line for line in allowed if line.startswith("!")
    )
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"'/src\[([\w,]+)\]'", text)
    assert all(f"\n{extra} = [" in project for extra in extras.split(","))
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for file in ("Dockerfile", "kubernetes.yaml", "llama-run.service"):
        assert f"`deploy/{file}`" in page
