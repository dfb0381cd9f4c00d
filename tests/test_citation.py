"""What a reader cites, what the demo fetches and under which licence, and what an issue form asks for: each agrees with what it speaks of."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from homelib.data.demo import DEMO_MANIFESTS
from homelib.data.manifest import PackageFile, load_manifest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}  # of GitHub's forms


# ---------------------------------------------------------------- citation and changelog


def test_the_citation_has_what_the_format_requires_and_agrees_with_the_project():
    """The required keys of the Citation File Format 1.2.0, and of a reference in it."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert cff["cff-version"] == "1.2.0"
    assert (cff["title"], cff["version"], cff["license"]) == (PROJECT["name"], PROJECT["version"], PROJECT["license"])
    paper = cff["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["type"] == "conference-paper"
    for authors in (cff["authors"], paper["authors"]):
        assert authors
        assert all("name" in author or {"family-names", "given-names"} <= set(author) for author in authors)
    (number,) = re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "README.md").read_text().split("## Licence and citation")[1])
    assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]
    assert paper["url"].endswith(number)
    told = " ".join((ROOT / "README.md").read_text().split())
    assert paper["title"] in told


def test_the_changelogs_newest_version_is_the_projects():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (\S+) - (unreleased|\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert versions[0][0] == PROJECT["version"]
    assert versions == sorted(versions, reverse=True)
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}


# ---------------------------------------------------------------- licences


def test_the_licences_of_what_the_demo_fetches_are_those_of_its_manifests():
    lines = [line for line in (ROOT / "LICENSES.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    named = {}
    for package, version, kind, megabytes, licence, notice, files, data_set in rows:
        named[data_set, package] = (version, kind, float(megabytes), licence, set(re.findall(r"`(.*?)`", files)))
        assert notice
    expected = {}
    for name in DEMO_MANIFESTS:
        manifest = load_manifest(name)
        for package, one in manifest.packages.items():
            sources = [source for case in manifest.cases for source in (case.image, case.label)]
            members = {Path(s.member).name for s in sources if isinstance(s, PackageFile) and s.package == package}
            told = re.findall(rf"([\w.-]+) \({package}\)|^Package: ([\w.-]+)\.", manifest.licence)
            (licence,) = {a or b for a, b in told}
            expected[name, package] = (one.version, one.kind, one.megabytes, licence, members)
    assert named == expected
    assert sum(megabytes for _, _, megabytes, *_ in named.values()) == pytest.approx(82, abs=1), "what README and LICENSES.md say of the download"


def test_the_licence_is_the_projects():
    assert (ROOT / "LICENSE").read_text().startswith(f"{PROJECT['license']} License\n")
    assert PROJECT["license-files"] == ["LICENSE"]


# ---------------------------------------------------------------- issue forms


def test_the_forms_are_forms():
    assert set(FORMS) == {"bug_report", "question", "data_set", "config"}
    assert FORMS["config"]["blank_issues_enabled"] is False
    assert all({"name", "url", "about"} <= set(link) for link in FORMS["config"]["contact_links"])
    for name, form in FORMS.items():
        if name == "config":
            continue
        assert form["name"]
        assert form["description"]
        fields = form["body"]
        ids = [field["id"] for field in fields if field["type"] != "markdown"]
        assert len(ids) == len(set(ids)) > 1
        for field in fields:
            assert field["type"] in KINDS
            assert field["attributes"].get("label") or field["type"] == "markdown"
            options = field["attributes"].get("options", [])
            assert all(isinstance(o["label"] if field["type"] == "checkboxes" else o, str) for o in options), "quote yes and no: YAML takes them for truth"
            assert bool(options) is (field["type"] in ("dropdown", "checkboxes"))
        assert any(field.get("validations", {}).get("required") for field in fields)


def test_a_fault_is_told_with_what_home_doctor_prints():
    required = {field["id"]: field for field in FORMS["bug_report"]["body"] if field.get("validations", {}).get("required")}
    assert "home doctor --report" in required["doctor"]["attributes"]["label"]
    assert "render" not in required["doctor"]["attributes"], "the report is Markdown, to be shown as such"
