"""Work directories in a bucket: a run there equals the run on a disk."""

import pytest
from bucket import Bucket
from runs import Crash, act_in_step, command, fails, files_of

from alignjax import convert, report, train
from alignjax.machine import workdir as workdirs


@pytest.fixture
def bucket(monkeypatch):
    """A server of one bucket, which all clients of Google's storage use."""
    server = Bucket()
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, server.url)
    # Otherwise gcsfs asks Google what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # for TensorStore
    yield server
    server.shutdown()


def test_a_run_in_a_bucket_resumes_and_ends_as_one_on_disk(
    bucket, chain, tmp_path, monkeypatch, capsys
):
    """The run is cut off after its first checkpoint, when nothing more reaches the bucket."""
    arguments = ["--config", "lm.py:tiny", "--workdir", "gs://bucket/runs/lm-tiny"]

    def lose_the_bucket():
        monkeypatch.setattr(workdirs, "publish", lambda *_: None)
        raise Crash

    with monkeypatch.context() as monkeypatch, act_in_step(3, lose_the_bucket):
        with pytest.raises(Crash):
            train.main(arguments)
    assert bucket.objects["runs/lm-tiny/metrics.jsonl"].data.count(b"\n") == 2
    assert train.main(arguments) == 0
    assert "lm-tiny: resuming from step 2" in capsys.readouterr().out
    assert report.main(["gs://bucket/runs/lm-tiny"]) == 0
    assert report.main(["gs://bucket/runs/lm-tiny", "--out", str(tmp_path / "report.html")]) == 0
    in_bucket = bucket.objects["runs/lm-tiny/report.html"].data
    assert in_bucket == (tmp_path / "report.html").read_bytes()
    bucket.download(tmp_path)
    run = tmp_path / "runs" / "lm-tiny"
    assert files_of(run) == files_of(chain.runs / "lm-tiny")
    assert len(list((run / "tensorboard").iterdir())) == 2
    exported = []
    for runs, name in (("gs://bucket/runs", "from-bucket"), (chain.runs, "from-disk")):
        out = tmp_path / name
        assert convert.main(["--to_hf", f"{runs}/lm-tiny", "--out", str(out)]) == 0
        exported.append((out / "model.safetensors").read_bytes())
    assert exported[0] == exported[1]


def test_a_place_that_cannot_be_reached_is_an_error(capsys, tmp_path):
    line = fails(capsys, *command("lm-tiny", tmp_path)[:2], "--workdir", "s3://bucket/run")
    assert "expected a directory or gs://BUCKET/..." in line
