"""`hf-rb push`: uploads a model, an adapter, GGUF files, a teacher cache or a report to the Hub."""

import argparse
from typing import TYPE_CHECKING

from hf_rb.utils.output import json_text


if TYPE_CHECKING:
    from hf_rb.hub import Upload

EXAMPLE = "hf-rb push outputs/student-ptqtp me/student-ptqtp --results eval.json --dry-run"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="folder of a model, an adapter, GGUF files or a teacher cache (a dataset on the Hub), or the HTML file "
        "of a report (a static Space)",
    )
    parser.add_argument(
        "repo", metavar="REPO", help="repository on the Hub, as me/my-model; made where it does not exist"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to (default main)")
    parser.add_argument("--message", help="commit message")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="what `hf-rb eval --out` wrote, for the model card"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and stop")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from hf_rb import hub

    hub.check_repo_id(args.repo)
    results = [one for file in args.results for one in hub.read_results(file, models=[args.folder, args.repo])]
    upload = hub.plan_upload(args.folder, args.repo, results)
    if args.dry_run:
        _show(args, upload, len(results), url=None)
        return 0
    if results:
        hub.add_results(f"{args.folder}/README.md", results)
    commit = hub.push_folder(
        args.folder,
        args.repo,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.message,
        results=results,
    )
    _show(args, upload, len(results), url=commit.repo_url.url)
    return 0


def _show(args: argparse.Namespace, upload: "Upload", results: int, url: str | None) -> None:
    if args.json:
        report = {
            "repo": args.repo,
            "repo_type": upload.repo_type,
            "url": url,
            "files": upload.files,
            "left_out": upload.left_out,
            "results": results,
            "notes": upload.notes,
        }
        print(json_text(report))
        return
    for name, size in upload.files.items():
        of_card = f", with {results} results of {', '.join(args.results)}" if results and name == "README.md" else ""
        print(f"{size:15,}  {name}{of_card}")
    kind = {"model": "", "dataset": "the dataset ", "space": "the static Space "}[upload.repo_type]
    print(
        f"{upload.size:15,}  bytes in {len(upload.files)} files "
        + (f"are at {url}" if url else f"would go to {kind}{args.repo}")
    )
    for note in upload.notes:
        print(note)
    if upload.left_out:
        print(f"not uploaded: {', '.join(upload.left_out)}")
