# Getting LaMP's files, only when asked: `snakemake --cores all lamp --configfile config/paper.yaml`. Nothing else
# depends on these rules, so no other target ever downloads. OPPU_LAMP_SITE names another site.


rule lamp:
    input:
        [f"{RESULTS}/lamp/{task}.json" for task in to_fetch()],
    localrule: True


# The files are not declared: Snakemake deletes what a job declares, before it and when it fails, and with it what there
# is to go on from. The stamp vouches for them; a file that is gone brings the job back (`mended`).
rule fetch:
    output:
        f"{RESULTS}/lamp/{{task}}.json",
    log:
        f"{LOGS}/{{task}}/lamp.log",
    localrule: True
    conda:
        "../../envs/light.yaml"
    params:
        data=lambda w: CONFIG.folder(w.task),
        mended=lambda w: mended(f"{RESULTS}/lamp/{w.task}.json"),
    shell:
        "oppu lamp {params.data:q} {wildcards.task:q} --stamp {output:q} --mended {params.mended:q} > {log:q} 2>&1"
