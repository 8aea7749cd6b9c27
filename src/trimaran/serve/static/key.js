// The API key, where a server asks for one: held while the window lasts, or kept in the browser when that is wished.

import { keep, kept } from "./store.js";

const NAME = "trimaran.key";
let given = null; // for a browser that keeps nothing

/** The key to send, or null. */
export function apiKey() {
  try {
    return sessionStorage.getItem(NAME) ?? kept("key");
  } catch (problem) {
    if (problem.name !== "SecurityError") throw problem;
    return given;
  }
}

/** Sends `key` from now on (null: none). lasting: after the window is closed, too. */
export function holdKey(key, lasting) {
  given = key;
  keep("key", lasting ? key : null);
  try {
    if (key === null) sessionStorage.removeItem(NAME);
    else sessionStorage.setItem(NAME, key);
  } catch (problem) {
    if (problem.name !== "SecurityError") throw problem;
  }
}
