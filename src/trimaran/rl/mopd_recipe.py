"""Settings of multi-teacher on-policy distillation (stage "mopd")."""

from typing import Literal

from pydantic import Field, model_validator

from trimaran.config import Settings
from trimaran.errors import Refusal
from trimaran.rl.recipe import PolicySettings, RLRecipe, RolloutSettings, ShapingSettings


class TeacherSettings(Settings):
    """The model that knows an environment best: a run or hub folder."""

    path: str


class StudentRollouts(RolloutSettings):
    """As in reinforcement learning, but one rollout a prompt will do: nothing is compared within a group."""

    prompts: int = Field(64, ge=1)
    samples: int = Field(1, ge=1)


class DistilledPolicy(PolicySettings):
    """As in reinforcement learning. The advantage is the teacher's, so there are no rewards to normalise or shuffle;
    an answer cut at its longest is as good a text to be corrected as any. Published clip of the advantage: 20."""

    advantage_clip: float | None = Field(20.0, gt=0)
    overlong: Literal["filter", "score"] = "score"
    normalise: Literal[False] = False
    shuffle_rewards: Literal[False] = False


class MopdRecipe(RLRecipe):
    """One run of distillation: `trimaran train RECIPE`. `teachers`: one for each environment, by its name.

    teachers_at_once: how many are held in memory; 0: all. shuffle_teachers: a control, in which each environment is
    taught by the next one's teacher. match: at each place the token that the student said is judged ("tokens", as
    published), or its whole law ("laws", see whole_laws.py).
    """

    stage: Literal["mopd"] = "mopd"
    teachers: dict[str, TeacherSettings]
    teachers_at_once: int = Field(0, ge=0)
    shuffle_teachers: bool = False
    match: Literal["tokens", "laws"] = "tokens"
    rollouts: StudentRollouts = StudentRollouts()
    policy: DistilledPolicy = DistilledPolicy()

    @model_validator(mode="after")
    def _one_teacher_each(self) -> "MopdRecipe":
        environments, teachers = set(self.environments), set(self.teachers)
        if missing := sorted(environments - teachers):
            found = f"no teacher for {', '.join(missing)}"
            raise Refusal(found, "one for each environment", f"add [teachers.{missing[0]}] with its path")
        if idle := sorted(teachers - environments):
            found = f"a teacher for {', '.join(idle)}, which is no environment"
            raise Refusal(found, ", ".join(sorted(environments)), f"add [environments.{idle[0]}], or leave it out")
        if self.shaping != ShapingSettings():
            raise Refusal("a table [shaping]", "none: a teacher's law has no reward to shape", "leave it out")
        if self.shuffle_teachers and len({one.path for one in self.teachers.values()}) < 2:
            found = "shuffle_teachers with one teacher for everything"
            raise Refusal(found, "two teachers and more", "leave it out")
        return self

    @model_validator(mode="after")
    def _laws_alone(self) -> "MopdRecipe":
        """Whole laws have no advantages and no reference, and are those of the present model."""
        if self.match != "laws":
            return self
        for name in ("malformed", "kl"):
            if value := getattr(self.policy, name):
                found = f'policy.{name} = {value} with match = "laws"'
                raise Refusal(found, "0: nothing but the teacher's law counts there", f"leave policy.{name} out")
        if self.updates > 1:
            size = self.rollouts.prompts * self.rollouts.samples
            found = f'match = "laws" with {self.updates} updates of a batch'
            raise Refusal(found, "one: the divergence is that of the present law", f"set train.batch_size={size}")
        return self

    def teacher_of(self, environment: str) -> str:
        """The folder of the model that teaches `environment`."""
        names = list(self.environments)
        if self.shuffle_teachers:
            environment = names[(names.index(environment) + 1) % len(names)]
        return self.teachers[environment].path
