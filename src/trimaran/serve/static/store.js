// What the browser keeps between visits. A browser that keeps nothing, or no more, is told of once and lived with.

const PREFIX = "trimaran.";

/** The value kept under `name`, or null. Text of another version or hand is as good as none. */
export function kept(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name));
  } catch (problem) {
    if (problem instanceof SyntaxError || problem.name === "SecurityError") return null;
    throw problem;
  }
}

/** Keeps `value` (null: forgets it). Returns whether the browser did. */
export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch (problem) {
    if (problem.name === "QuotaExceededError" || problem.name === "SecurityError") return false;
    throw problem;
  }
}
