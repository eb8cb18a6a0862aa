"""NVFLARE's own constants that scripts name, for which fedloom has no other use."""

from __future__ import annotations

from enum import Enum


class NPConstants:
    """Where numpy scripts find their array."""

    NUMPY_KEY = "numpy_key"


class DataKind:
    """Kinds of results, as recipes take them."""

    FL_MODEL = "FL_MODEL"
    WEIGHTS = "WEIGHTS"
    WEIGHT_DIFF = "WEIGHT_DIFF"
    METRICS = "METRICS"
    ANALYTIC = "ANALYTIC"
    COLLECTION = "COLLECTION"
    STATISTICS = "STATISTICS"
    PSI = "PSI"
    APP_DEFINED = "APP_DEFINED"


class FLMetaKey:
    """Keys of ``FLModel.meta``."""

    NUM_STEPS_CURRENT_ROUND = "NUM_STEPS_CURRENT_ROUND"
    INITIAL_METRICS = "initial_metrics"
    START_ROUND = "start_round"
    CURRENT_ROUND = "current_round"
    TOTAL_ROUNDS = "total_rounds"
    JOB_ID = "job_id"
    SITE_NAME = "site_name"
    SUBMIT_MODEL_NAME = "submit_model_name"


class AppConstants:
    """Names of tasks, and of rounds."""

    TASK_TRAIN = "train"
    TASK_VALIDATION = "validate"
    TASK_SUBMIT_MODEL = "submit_model"
    START_ROUND = "start_round"
    CURRENT_ROUND = "current_round"
    NUM_ROUNDS = "num_rounds"
    CROSS_VAL_DIR = "cross_site_val"


class DefaultCheckpointFileName:
    """Names that fedloom's results do not have: they are model.safetensors and best_model.safetensors."""

    GLOBAL_MODEL = "FL_global_model.pt"
    BEST_GLOBAL_MODEL = "best_FL_global_model.pt"


class ModelName:
    """Which model ``submit_model`` asks for."""

    BEST_MODEL = "best_model"
    FINAL_MODEL = "final_model"


class RunStatus(Enum):
    """How jobs stand; fedloom says SUBMITTED, RUNNING, FINISHED:COMPLETED, FINISHED:ABORTED or FINISHED:FAILED."""

    SUBMITTED = "SUBMITTED"
    APPROVED = "APPROVED"
    DISPATCHED = "DISPATCHED"
    RUNNING = "RUNNING"
    FINISHED_COMPLETED = "FINISHED:COMPLETED"
    FINISHED_ABORTED = "FINISHED:ABORTED"
    FINISHED_EXECUTION_EXCEPTION = "FINISHED:EXECUTION_EXCEPTION"
    FINISHED_ABNORMAL = "FINISHED:ABNORMAL"
    FINISHED_CANT_SCHEDULE = "FINISHED:CAN_NOT_SCHEDULE"
    FAILED_TO_RUN = "FINISHED:FAILED_TO_RUN"
    ABANDONED = "FINISHED:ABANDONED"


class AnalyticsDataType(Enum):
    """Kinds of records that `flare.log` takes."""

    SCALAR = "SCALAR"
    SCALARS = "SCALARS"
    IMAGE = "IMAGE"
    TEXT = "TEXT"
    LOG_RECORD = "LOG_RECORD"
    PARAMETER = "PARAMETER"
    PARAMETERS = "PARAMETERS"
    METRIC = "METRIC"
    METRICS = "METRICS"
    MODEL = "MODEL"
    TAG = "TAG"
    TAGS = "TAGS"
    INIT_DATA = "INIT_DATA"


DEFAULT_ADMIN_USER = "admin@nvidia.com"
