// The control API. The token goes into a header, never into an address.

const TIMEOUT_MS = 15_000; // a change waits up to 10 s for its ranks

/** What the server refused (with its status), or that it did not answer (status 0). */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Api {
  #token;

  constructor(token) {
    if (!/^[\x21-\x7e]*$/.test(token)) {
      throw new ApiError(401, "No token has spaces or letters outside ASCII.");
    }
    this.#token = token;
  }

  get(what) {
    return this.#ask("GET", what);
  }

  put(what, change) {
    return this.#ask("PUT", what, change);
  }

  async #ask(method, what, change) {
    const headers = {};
    if (this.#token) headers.Authorization = `Bearer ${this.#token}`;
    if (change) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(what, { // relative to /sere/ui: /sere/stats, whatever stands before
        method,
        headers,
        body: change && JSON.stringify(change),
        cache: "no-store",
        credentials: "omit",
        redirect: "error",
        signal: AbortSignal.timeout(TIMEOUT_MS),
      });
    } catch (error) {
      const late = error.name === "TimeoutError";
      throw new ApiError(0, late ? `no answer within ${TIMEOUT_MS / 1000} s` : "not reachable");
    }
    const answer = await response.json().catch(() => null);
    if (!response.ok) {
      throw new ApiError(response.status, answer?.error?.message ?? `status ${response.status}`);
    }
    if (answer === null) throw new ApiError(0, "the answer was not JSON");
    return answer;
  }
}
