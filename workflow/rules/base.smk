rule base_recipe:
    output:
        f"{BASE}/recipe.json",
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/base_recipe.log",
    localrule: True
    conda:
        "../../envs/light.yaml"
    params:
        recipe=lambda w: as_json(recipe.base_recipe(CONFIG, w.task, w.augmentation)),
    shell:
        "printf '%s\\n' {params.recipe:q} > {output:q} 2> {log:q}"


# The adapter beside base.json is not declared: Snakemake deletes what is declared, before a job and when it fails.
rule base:
    input:
        users=base_users,
        recipe=f"{BASE}/recipe.json",
        model=model_files,
        profiles=lambda w: profile_stamp(w, "base"),
    output:
        f"{BASE}/base.json",
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/base.log",
    benchmark:
        f"{BENCHMARKS}/{{task}}/{{augmentation}}/base.tsv"
    conda:
        "../../envs/oppu.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        gpu=GPU,
    params:
        mended=lambda w: mended(f"{BASE}/base.json".format(**w)),
        profiles=lambda w: PROFILES.format(**w),
    shell:
        "oppu --gpus {resources.gpu} base {output:q}"
        " --recipe {input.recipe:q} --base-users {input.users:q} --mended {params.mended:q}"
        " --profiles {params.profiles:q} > {log:q} 2>&1"
