def raw_files(task):
    "LaMP's files of a task, as they are: compressed or not, train and dev."
    names = [f"{part}_{kind}.json{end}" for part in ("train", "dev") for kind in ("questions", "outputs") for end in ("", ".gz")]
    found = [path for path in (f"{CONFIG.data}/{task}/{name}" for name in names) if os.path.exists(path)]
    return found or [f"{CONFIG.data}/{task}/dev_questions.json"]


# Also writes histories/{user}.json and base.jsonl, each only when its bytes differ, so that their mtimes tell which
# users changed. They are not declared: Snakemake would delete them first, and nothing could be compared.
checkpoint split:
    input:
        lambda w: raw_files(w.task),
    output:
        users=SPLIT + "/users.json",
        queries=SPLIT + "/queries.parquet",
    params:
        settings=as_json(CONFIG.split.model_dump()),
        version=recipe.VERSIONS["split"],
        mended=lambda w: mended(SPLIT.format(**w) + "/users.json"),
        data=CONFIG.data,
    log:
        LOGS + "/{task}/split.log",
    conda:
        "../../envs/oppu.yaml"
    shell:
        "oppu split {params.data:q} {wildcards.task:q} {output.users:q} --settings {params.settings:q}"
        " --mended {params.mended:q} > {log:q} 2>&1"


# Reads and validates all raw files before anything costly starts.
rule data:
    input:
        lambda w: [path for task in TASKS for path in raw_files(task)],
    output:
        RESULTS + "/data.txt",
    params:
        data=CONFIG.data,
        tasks=TASKS,
    log:
        LOGS + "/data.log",
    conda:
        "../../envs/oppu.yaml"
    shell:
        "oppu check {params.data:q} {params.tasks:q} > {output:q} 2> {log:q}"
