"""Print the JSON schema of ``simplifications.json``."""

import json

from jacobian_robust_studies.simplifications.schema import Simplifications

if __name__ == "__main__":
    print(json.dumps(Simplifications.model_json_schema(), indent=2))
