/**
 * etcd 3.4 or later, through its JSON gateway with `fetch`. What it keeps for a cluster is in etcdledger.ts.
 *
 * A request goes to one endpoint after the other until one answers. It may have been carried out though no answer came, and
 * is then said again: so whoever writes compares first. Reads are linearizable: a member that is cut off from the others
 * does not answer them. A watch is held at one endpoint, and whoever holds it tells when it has gone silent.
 */
import { readFileSync } from "node:fs";
import { isLoopback, sleep } from "./connection.ts";
import { checkAnswer, checkLength, checkWatched, textsOf, wholeTextOf } from "./etcdanswers.ts";
import { quote, RepriseError } from "./protocol.ts";

/** For one answer; a member that has been stopped gives none. */
const TRY_MS = 2_500;
/** How long an installation may take to choose another leader. */
const PATIENCE_MS = 4_000;
const FIRST_PAUSE_MS = 50;
const LAST_PAUSE_MS = 500;
const DEFAULT_PORT = 2379;
const MAX_TEXT = 200;

/** Where a cluster's ledger is, and how one gets in. */
export interface EtcdCluster {
  name: string;
  /** `http://host:port` */
  endpoints: string[];
  user?: string | undefined;
  password?: string | undefined;
  tls?: { ca?: string; cert?: string; key?: string } | undefined;
}

type Environment = { [name: string]: string | undefined };

/**
 * Reads `etcd://[user[:password]@]host[:port][,…]/NAME`, `etcds://` for TLS. What is not in it comes from the environment:
 * REPRISE_ETCD_USER and REPRISE_ETCD_PASSWORD; for TLS the files REPRISE_ETCD_CACERT, _CERT and _KEY, or those of etcdctl.
 * Throws `usage`, `local` for a file that cannot be read, and `insecure` for a password in clear.
 */
export function parseCluster(text: string, environment: Environment = process.env): EtcdCluster {
  const match = /^(etcds?):\/\/(?:(.*)@)?([^@/]+)\/([^@/]*)\/?$/i.exec(text.trim());
  // Whoever reads the message is not to read a password.
  const shown = quote(text.replace(/^(\w+:\/\/)?.*@/s, "$1…@"));
  if (!match) throw usage(`--cluster takes etcd://HOST:PORT[,HOST:PORT…]/NAME, not ${shown}`);
  const [, scheme, login, hosts, name] = match as unknown as [string, string, string | undefined, string, string];
  if (!/^[A-Za-z0-9][\w.-]{0,63}$/.test(name))
    throw usage(`a cluster's name is letters, digits, ".", "_" and "-", at most 64 of them, not ${quote(name)}`);
  const isSafe = scheme.toLowerCase() === "etcds";
  const addresses = hosts.split(",").map((host) => addressOf(host.trim(), shown));
  const endpoints = addresses.map(({ host, port }) => `${isSafe ? "https" : "http"}://${host}:${port}`);
  const account = accountOf(login, environment);
  const inClear = isSafe || !account.user ? undefined : addresses.find(({ host }) => !isHere(host));
  if (inClear)
    throw new RepriseError("insecure", `no password is sent in clear to another machine; use etcds://${inClear.host}…`);
  return { name, endpoints, ...account, tls: isSafe ? tlsOf(environment) : undefined };
}

function addressOf(text: string, shown: string): { host: string; port: number } {
  const match = /^(\[[0-9a-f:.]+\]|[^\s:[\]/?#\\]+)(?::(\d{1,5}))?$/i.exec(text);
  const port = Number(match?.[2] ?? DEFAULT_PORT);
  if (!match || port < 1 || port > 65_535) throw usage(`${quote(text)} is no HOST:PORT, in --cluster ${shown}`);
  return { host: match[1]!.toLowerCase(), port };
}

function isHere(host: string): boolean {
  return host === "localhost" || isLoopback(host.replace(/^\[|\]$/g, ""));
}

function accountOf(login: string | undefined, environment: Environment): Pick<EtcdCluster, "user" | "password"> {
  const [, name, secret] = /^([^:]*)(?::(.*))?$/s.exec(login ?? "")!;
  const user = decoded(name) || environment.REPRISE_ETCD_USER;
  const password = decoded(secret) ?? environment.REPRISE_ETCD_PASSWORD;
  if (!user && password) throw usage("a password for etcd and no user; REPRISE_ETCD_USER says who");
  if (user && !password) throw usage(`no password for etcd's user ${quote(user)}; REPRISE_ETCD_PASSWORD says it`);
  return user ? { user, password } : {};
}

function decoded(text: string | undefined): string | undefined {
  try {
    return text && decodeURIComponent(text);
  } catch (error) {
    throw usage('in the user and password of --cluster, "%" begins a byte in hexadecimal: "%25" is "%"', error);
  }
}

function tlsOf(environment: Environment): EtcdCluster["tls"] {
  const fileOf = (what: string) => environment[`REPRISE_ETCD_${what}`] || environment[`ETCDCTL_${what}`];
  const [ca, cert, key] = [fileOf("CACERT"), fileOf("CERT"), fileOf("KEY")];
  if ((cert === undefined) !== (key === undefined))
    throw usage("a client's certificate for etcd needs its key, too: REPRISE_ETCD_CERT and REPRISE_ETCD_KEY");
  return { ...(ca && { ca: textOf(ca) }), ...(cert && { cert: textOf(cert) }), ...(key && { key: textOf(key) }) };
}

function textOf(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new RepriseError("local", `cannot read ${quote(path)}: ${(error as NodeJS.ErrnoException).code}`, error);
  }
}

// ---------------------------------------------------------------------------------------------------- messages

/** As the gateway writes it: 64 bits as text, bytes in base64, and nothing for 0. */
export interface KeyValue {
  key: string;
  value?: string;
  mod_revision: string;
  lease?: string;
}

export interface Header {
  revision?: string;
}

export interface RangeAnswer {
  header?: Header;
  kvs?: KeyValue[];
  more?: boolean;
}

export interface TxnAnswer {
  header: Header;
  succeeded?: boolean;
  responses?: { response_range?: RangeAnswer }[];
}

export interface Watched {
  header?: Header;
  created?: boolean;
  canceled?: boolean;
  compact_revision?: string;
  cancel_reason?: string;
  /** The rest of its last revision comes with the next one. */
  fragment?: boolean;
  events?: { type?: "DELETE"; kv: KeyValue }[];
}

export type Compare = { key: string; target: "MOD"; result: "EQUAL"; mod_revision: string };
export type Operation =
  | { request_range: Range }
  | { request_put: { key: string; value: string; lease?: string } }
  | { request_delete_range: { key: string; range_end?: string } };

export interface Range {
  key: string;
  range_end?: string;
  limit?: string;
  revision?: string;
  keys_only?: boolean;
  min_mod_revision?: string;
  sort_order?: "ASCEND";
  sort_target?: "MOD";
}

export interface Txn {
  compare?: Compare[];
  success: Operation[];
  failure?: Operation[];
}

export function encoded(text: string): string {
  return Buffer.from(text).toString("base64");
}

/** Throws TypeError where it is no UTF-8. */
export function decodedText(base64: string): string {
  return utf8.decode(Buffer.from(base64, "base64"));
}

const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** The end of the range of all keys that begin with a text that ends with "/". */
export function endOf(prefix: string): string {
  return encoded(`${prefix.slice(0, -1)}0`);
}

/** That a key has not been written since, 0: that there is none. */
export function unchanged(key: string, revision: number): Compare {
  return { key: encoded(key), target: "MOD", result: "EQUAL", mod_revision: String(revision) };
}

export function put(key: string, value: string, lease?: string): Operation {
  return { request_put: { key: encoded(key), value: encoded(value), ...(lease && { lease }) } };
}

export function get(key: string): Operation {
  return { request_range: { key: encoded(key) } };
}

/** All whose keys begin with that. */
export function getAll(prefix: string): Operation {
  return { request_range: { key: encoded(prefix), range_end: endOf(prefix) } };
}

export function remove(key: string): Operation {
  return { request_delete_range: { key: encoded(key) } };
}

export function removeAll(prefix: string): Operation {
  return { request_delete_range: { key: encoded(prefix), range_end: endOf(prefix) } };
}

// ---------------------------------------------------------------------------------------------------- requests

export interface EtcdOptions {
  tryMs?: number;
  patienceMs?: number;
}

/** What several calls have in common: the endpoint that answers, and the token. */
export class Etcd {
  readonly endpoints: readonly string[];
  readonly name: string;
  readonly #cluster: EtcdCluster;
  readonly #tryMs: number;
  readonly #patienceMs: number;
  readonly #closed = new AbortController();
  #at = 0;
  #token: Promise<string> | undefined;

  constructor(cluster: EtcdCluster, { tryMs = TRY_MS, patienceMs = PATIENCE_MS }: EtcdOptions = {}) {
    this.#cluster = cluster;
    this.endpoints = cluster.endpoints;
    this.name = cluster.name;
    this.#tryMs = tryMs;
    this.#patienceMs = patienceMs;
  }

  range(range: Range, signal?: AbortSignal): Promise<RangeAnswer> {
    return this.call<RangeAnswer>("/v3/kv/range", range, signal);
  }

  txn(txn: Txn, signal?: AbortSignal): Promise<TxnAnswer> {
    return this.call<TxnAnswer>("/v3/kv/txn", txn, signal);
  }

  /** Returns its id, which does not fit a number. */
  async grant(seconds: number): Promise<string> {
    const { ID } = await this.call("/v3/lease/grant", { TTL: String(seconds) });
    return String(ID);
  }

  /** Whether it still was. */
  async keepAlive(lease: string): Promise<boolean> {
    const { result } = await this.call<{ result?: { TTL?: string } }>("/v3/lease/keepalive", { ID: lease });
    return Number(result?.TTL ?? 0) > 0;
  }

  /** Also where it has ended already, as it has when an answer was lost and this is asked again. */
  async revoke(lease: string): Promise<void> {
    try {
      await this.call("/v3/lease/revoke", { ID: lease });
    } catch (error) {
      if (!(error instanceof RepriseError && error.code === "not_found")) throw error;
    }
  }

  /**
   * Asks one endpoint after the other, until one answers or it takes too long. Throws `busy` where none does, `denied` for
   * what the user may not, `not_found`, `no_room`, `failed`.
   */
  async call<T = Answer>(path: string, body: object, signal?: AbortSignal): Promise<T> {
    const begun = performance.now();
    for (let round = 0; ; round++) {
      const failures = new Map<string, RepriseError>();
      for (const _ of this.endpoints) {
        const at = this.#at;
        const endpoint = this.endpoints[at]!;
        try {
          return await this.callAt<T>(endpoint, path, body, signal);
        } catch (error) {
          if (!isOfEndpoint(error)) throw error;
          failures.set(endpoint, error);
          // Unless another call has left it already.
          if (this.#at === at) this.#at = (at + 1) % this.endpoints.length;
        }
      }
      const mayPass = [...failures.values()].some(({ code }) => code === "busy");
      if (!mayPass || performance.now() - begun > this.#patienceMs) throw unreachable(failures);
      await this.#pause(round, signal);
    }
  }

  async #pause(round: number, signal: AbortSignal | undefined): Promise<void> {
    await sleep(Math.min(LAST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** round) * (0.75 + Math.random() / 2), signal);
    this.#checkOpen();
  }

  /** The same of one endpoint, once. */
  async callAt<T = Answer>(endpoint: string, path: string, body: object, signal?: AbortSignal): Promise<T> {
    return this.#authorized(endpoint, (headers) =>
      this.#timed(signal, async (signal) => {
        const response = await this.#send(endpoint, path, body, { headers, signal });
        const text = await wholeTextOf(response);
        if (!response.ok) throw refusal(response.status, text);
        const answer = parsed(text);
        // What is a stream to etcd says so in its first line.
        if (answer.error) throw refusal(response.status, JSON.stringify(answer.error));
        checkAnswer(path, body, answer);
        return answer as T;
      }),
    );
  }

  /** Messages of a watch; ends by a throw alone, of what `signal` was given, too. `onBytes`: parts of one come. */
  async *watch(
    endpoint: string,
    create: object,
    { signal, onBytes }: { signal: AbortSignal; onBytes: () => void },
  ): AsyncGenerator<Watched> {
    const ended = new AbortController();
    const end = () => ended.abort(signal.reason);
    if (signal.aborted) end();
    signal.addEventListener("abort", end, { once: true });
    try {
      const body = { create_request: create };
      const response = await this.#authorized(endpoint, (headers) =>
        this.#timedStart(ended, async () => {
          const response = await this.#send(endpoint, "/v3/watch", body, { headers, signal: ended.signal });
          if (!response.ok) throw refusal(response.status, await wholeTextOf(response));
          return response;
        }),
      );
      for await (const line of linesOf(response, onBytes)) {
        const { result, error } = parsed(line);
        if (error) throw refusal(500, JSON.stringify(error));
        checkWatched(result);
        if (result.canceled && isAboutToken(result.cancel_reason ?? "")) this.#token = undefined;
        yield result;
      }
      throw new RepriseError("busy", "the watch has ended");
    } catch (error) {
      throw this.#explained(error, ended.signal);
    } finally {
      signal.removeEventListener("abort", end);
      ended.abort(new RepriseError("interrupted"));
    }
  }

  close(): void {
    this.#closed.abort(closed());
  }

  #checkOpen(): void {
    if (this.#closed.signal.aborted) throw closed();
  }

  #send(
    endpoint: string,
    path: string,
    body: object,
    { headers, signal }: { headers: Headers; signal: AbortSignal },
  ): Promise<Response> {
    const { tls } = this.#cluster;
    return fetch(endpoint + path, {
      method: "POST",
      body: JSON.stringify(body),
      headers,
      signal,
      redirect: "error",
      ...(tls && { tls }),
    });
  }

  /** Only so long, and until this is closed. */
  async #timed<T>(signal: AbortSignal | undefined, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
    this.#checkOpen();
    const ended = new AbortController();
    const timer = setTimeout(() => ended.abort(this.#late()), this.#tryMs);
    const signals = [this.#closed.signal, ...(signal ? [signal] : [])];
    const end = (event: Event) => ended.abort((event.target as AbortSignal).reason);
    if (signal?.aborted) ended.abort(signal.reason);
    for (const one of signals) one.addEventListener("abort", end, { once: true });
    try {
      return await work(ended.signal);
    } catch (error) {
      throw this.#explained(error, ended.signal);
    } finally {
      clearTimeout(timer);
      for (const one of signals) one.removeEventListener("abort", end);
    }
  }

  /** The same of what goes on after that. */
  async #timedStart<T>(ended: AbortController, work: () => Promise<T>): Promise<T> {
    this.#checkOpen();
    const timer = setTimeout(() => ended.abort(this.#late()), this.#tryMs);
    const end = () => ended.abort(closed());
    this.#closed.signal.addEventListener("abort", end, { once: true });
    // Until the watch ends: it is told by this signal.
    ended.signal.addEventListener("abort", () => this.#closed.signal.removeEventListener("abort", end), { once: true });
    try {
      return await work();
    } finally {
      clearTimeout(timer);
    }
  }

  #late(): RepriseError {
    return new RepriseError("busy", `no answer within ${this.#tryMs / 1000} s`);
  }

  #explained(error: unknown, { aborted, reason }: AbortSignal): unknown {
    if (aborted) return reason;
    if (error instanceof RepriseError) return error;
    return networkError(error as Error & { code?: string }, this.#cluster.tls !== undefined);
  }

  // ------------------------------------------------------------------------------------------------ the user

  /** A token ends when it was not used for some minutes, and with the member that gave it: then another is asked for. */
  async #authorized<T>(endpoint: string, work: (headers: Headers) => Promise<T>): Promise<T> {
    if (this.#cluster.user === undefined) return work({});
    const token = await this.#authenticate(endpoint);
    try {
      return await work(token === "" ? {} : { Authorization: token });
    } catch (error) {
      if (!(error instanceof RepriseError && isAboutToken(error.message))) throw error;
      this.#token = undefined;
      return work({ Authorization: await this.#authenticate(endpoint) });
    }
  }

  /** "" where etcd asks nobody. */
  async #authenticate(endpoint: string): Promise<string> {
    this.#token ??= this.#ask(endpoint);
    const asked = this.#token;
    try {
      return await asked;
    } catch (error) {
      if (this.#token === asked) this.#token = undefined;
      throw error;
    }
  }

  async #ask(endpoint: string): Promise<string> {
    const { user, password } = this.#cluster;
    const body = { name: user, password };
    return this.#timed(undefined, async (signal) => {
      const response = await this.#send(endpoint, "/v3/auth/authenticate", body, { headers: {}, signal });
      const text = await wholeTextOf(response);
      if (response.ok) return tokenIn(text);
      if (/authentication is not enabled/.test(text)) return "";
      const error = refusal(response.status, text);
      if (error.code !== "denied") throw error;
      throw new RepriseError("denied", `etcd does not let the user ${quote(user!)} in: ${error.message}`, error);
    });
  }
}

/** Of a request. */
type Headers = { [name: string]: string };
type Answer = { [name: string]: unknown };

async function* linesOf(response: Response, onBytes: () => void): AsyncGenerator<string> {
  const parts: string[] = [];
  let characters = 0;
  for await (const text of textsOf(response)) {
    onBytes();
    const lines = text.split("\n");
    for (const [at, line] of lines.entries()) {
      characters = checkLength(characters + line.length);
      parts.push(line);
      if (at === lines.length - 1) break;
      const whole = parts.splice(0).join("");
      characters = 0;
      if (whole !== "") yield whole;
    }
  }
}

/** "" where there is none. */
function tokenIn(text: string): string {
  const { token = "" } = parsed(text);
  // It goes into a header.
  if (typeof token === "string" && /^[\x21-\x7e]*$/.test(token)) return token;
  throw new RepriseError("busy", "what it calls a token is none");
}

function parsed(text: string): Answer {
  try {
    const value = JSON.parse(text);
    if (typeof value === "object" && value !== null && !Array.isArray(value)) return value;
  } catch {
    // As if it were another value.
  }
  throw new RepriseError("version", "there is no JSON gateway of etcd 3.4 or later");
}

// ---------------------------------------------------------------------------------------------------- errors

/** Numbers of gRPC. */
const Status = {
  cancelled: 1,
  unknown: 2,
  deadlineExceeded: 4,
  notFound: 5,
  permissionDenied: 7,
  resourceExhausted: 8,
  internal: 13,
  unavailable: 14,
  unauthenticated: 16,
} as const;

/** What etcd says, in place of an answer. */
function refusal(http: number, text: string): RepriseError {
  const { code, message } = saidIn(text);
  if (/client sent an HTTP request to an HTTPS server/i.test(text))
    return new RepriseError("insecure", "TLS is spoken there; use etcds://");
  if (code === undefined) return new RepriseError("version", `no etcd 3.4 or later answers there (HTTP ${http})`);
  if (/space exceeded/.test(message))
    return new RepriseError("no_room", `etcd is full (${message}): compact, defragment and disarm its alarm`);
  if (code === Status.permissionDenied || /authentication failed|user name is empty|user name not found/.test(message))
    return new RepriseError("denied", message);
  if (code === Status.notFound) return new RepriseError("not_found", message);
  if (/too large|larger than max/.test(message)) return new RepriseError("too_large", message);
  return new RepriseError(mayPass(code, message) ? "busy" : "failed", message);
}

/** A member that has no leader, is starting or stopping, or has another token than the one that it is asked with. */
function mayPass(code: number, message: string): boolean {
  const { notFound, permissionDenied, ...passing } = Status;
  return (Object.values(passing) as number[]).includes(code) || isAboutToken(message);
}

function isAboutToken(message: string): boolean {
  return /invalid auth token|auth store is old|revision in header is old|user name is empty/.test(message);
}

function saidIn(text: string): { code?: number | undefined; message: string } {
  try {
    const said = JSON.parse(text);
    const message = String(said.message ?? said.error ?? "").replace(/^etcdserver: /, "");
    const code = said.code ?? said.grpc_code;
    return { code: typeof code === "number" ? code : undefined, message: message.slice(0, MAX_TEXT) };
  } catch {
    return { message: "" };
  }
}

const CUT = "connection cut";
const CAUSES: { [code: string]: string } = {
  ECONNREFUSED: "connection refused",
  ConnectionRefused: "connection refused",
  ECONNRESET: CUT,
  ConnectionClosed: CUT,
  ENOTFOUND: "no such host",
  EHOSTUNREACH: "no way to that host",
  ENETUNREACH: "no way to that network",
  ETIMEDOUT: "no answer",
};

/** Of `fetch`: no connection, or none that is safe. */
function networkError(error: Error & { code?: string }, isSafe: boolean): RepriseError {
  const code = error.code ?? "";
  const isTls = /CERT|TLS|SSL|UNABLE_TO|SELF_SIGNED|ERR_OSSL|ISSUER/.test(code);
  if (isTls) return new RepriseError("insecure", `its certificate is not accepted (${code})`, error);
  const cause = CAUSES[code] ?? (code || error.message).slice(0, MAX_TEXT);
  // So it looks from the outside where one side speaks TLS and the other does not.
  const hint = cause !== CUT ? "" : isSafe ? "; without TLS it is etcd://" : "; with TLS it is etcds://";
  return new RepriseError("busy", cause + hint, error);
}

/** Another endpoint may do better. */
function isOfEndpoint(error: unknown): error is RepriseError {
  return error instanceof RepriseError && ["busy", "insecure", "version"].includes(error.code);
}

/** What is said where no endpoint has answered. */
export function unreachable(failures: Map<string, RepriseError>): RepriseError {
  const each = [...failures].map(([endpoint, { message }]) => `${endpoint.replace(/^\w+:\/\//, "")}: ${message}`);
  const errors = [...failures.values()];
  const { code } = errors.find(({ code }) => code === "busy") ?? errors[0]!;
  return new RepriseError(code, `etcd cannot be used (${each.join("; ")})`, errors[0]);
}

function closed(): RepriseError {
  return new RepriseError("interrupted", "the connection to etcd was closed");
}

function usage(message: string, cause?: unknown): RepriseError {
  return new RepriseError("usage", message, cause);
}
