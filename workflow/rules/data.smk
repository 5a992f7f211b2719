# Also writes histories/{user}.json and base.jsonl, each only when its bytes differ, so that their mtimes tell which
# users changed. They are not declared: Snakemake would delete them first, and nothing could be compared.
checkpoint split:
    input:
        lambda w: raw_files(w.task),
    output:
        users=f"{SPLIT}/users.json",
        queries=f"{SPLIT}/queries.jsonl",
    log:
        f"{LOGS}/{{task}}/split.log",
    conda:
        "../../envs/light.yaml"
    params:
        settings=as_json(CONFIG.split.model_dump()),
        version=keys.VERSIONS["split"],
        mended=lambda w: mended(f"{SPLIT}/users.json".format(**w)),
        data=lambda w: CONFIG.folder(w.task),
    shell:
        "oppu split {params.data:q} {wildcards.task:q} {output.users:q} --settings {params.settings:q}"
        " --mended {params.mended:q} > {log:q} 2>&1"


# Reads and validates all raw files before anything costly starts.
rule data:
    input:
        lambda w: [path for task in TASKS for path in raw_files(task)],
    output:
        f"{RESULTS}/data.txt",
    log:
        f"{LOGS}/data.log",
    conda:
        "../../envs/light.yaml"
    params:
        folders=lambda w: [f"{CONFIG.folder(task)}/{task}" for task in TASKS],
    shell:
        "oppu check {params.folders:q} > {output:q} 2> {log:q}"
