# Made-up users with known preferences, for tasks whose `task_data` says `fixtures`. Cheap and the same bytes every time,
# so its outputs are declared.
rule fixtures_of:
    output:
        fixture_files("{task}"),
    log:
        f"{LOGS}/{{task}}/fixtures.log",
    conda:
        "../../envs/light.yaml"
    params:
        folder=lambda w: f"{RESULTS}/fixtures",
    shell:
        "oppu fixtures {params.folder:q} {wildcards.task:q} > {log:q} 2>&1"


rule fixtures:
    input:
        [path for task in TASKS if CONFIG.task_data.get(task) == "fixtures" for path in fixture_files(task)],
