/**
 * What the client's commands share: the options for all, the server they lead to, interruption, and going on after a
 * failure with what is left.
 */
import { closeSync, fstatSync, openSync, readFileSync } from "node:fs";
import { posix } from "node:path";
import {
  type Args,
  asFailure,
  numberOption,
  report,
  say,
  secondsOption,
  setProgress,
  setQuiet,
  sizeOption,
  usage,
} from "./command.ts";
import { Pace } from "./connection.ts";
import type { Address } from "./peer.ts";
import { DEFAULT_PORT, ERRORS, MAX_TOKEN_BYTES, quote, RepriseError } from "./protocol.ts";
import { parseServers, Remote, type RemoteOptions } from "./remote.ts";

/** How long an interrupted client may take to save its log before it is ended all the same. */
const INTERRUPT_MS = 1_000;

export const common = {
  server: { type: "string", valueHint: "host:port", description: "Server, or several with commas (REPRISE_SERVER)" },
  "token-file": { type: "string", valueHint: "file", description: "Access token, alone in a file (or REPRISE_TOKEN)" },
  ca: {
    type: "string",
    valueHint: "file",
    description: "PEM: trust these issuers, not the usual ones (or REPRISE_CA)",
  },
  timeout: {
    type: "string",
    valueHint: "seconds",
    default: "30",
    description: "Give up a wait after this long without a byte",
  },
  retries: { type: "string", valueHint: "number", default: "10", description: "Further attempts after a failure" },
  "limit-rate": { type: "string", valueHint: "rate", description: "Bytes a second at the most, as in 500K or 10M" },
  jobs: { type: "string", valueHint: "number", default: "2", description: "Connections that share a folder's files" },
  quiet: { type: "boolean", alias: "q", description: "Say nothing but errors" },
  progress: { type: "boolean", default: true, description: "A progress line on a terminal" },
  json: { type: "boolean", description: "One JSON object a line on stdout" },
} as const;

export const destination = {
  directory: {
    type: "string",
    alias: "d",
    valueHint: "dir",
    default: "client_root",
    description: "Folder for what arrives, and for resume logs",
  },
} as const;

/** What a command works with: at the prompt one for all lines, else one for the command. */
export interface Context {
  remote: Remote;
  server: string;
  /** The server was named by the user, rather than left to the default or a resume log. */
  isNamed: boolean;
  /** Another connection to a server, with the same options and the same way to interrupt; the token only goes to `server`. */
  connectTo: (server: string, options?: Pick<RemoteOptions, "direct">) => Remote;
  credentials: Pick<RemoteOptions, "token" | "ca">;
  /** Connections for many files. */
  jobs: number;
  /** At the prompt: the folder on the server that names are relative to. */
  folder: string | undefined;
  json: boolean;
}

/** Turns a function of a context into a command's `run`; the prompt hands its own context in as `data`. */
export function withContext(run: (context: Context, args: Args) => Promise<unknown>) {
  return async ({ args, data }: { args: unknown; data?: unknown }): Promise<void> => {
    const options = args as Args;
    if (data) return void (await run({ ...(data as Context), json: options.json === true }, options));
    setQuiet(options.quiet === true);
    setProgress(options.progress !== false);
    const context = contextFrom(options, watchSignals());
    try {
      await run(context, options);
    } finally {
      context.remote.close();
    }
  };
}

export function contextFrom(args: Args, signal: AbortSignal): Context {
  const limitRate = sizeOption(args, "limit-rate");
  const credentials = credentialsOf(args);
  const options = {
    // One for all connections: the line that they share is what it is about.
    pace: limitRate === undefined ? undefined : new Pace(limitRate),
    timeoutMs: secondsOption(args, "timeout"),
    retries: numberOption(args, "retries", { min: 0, max: 1_000_000 }),
    ...credentials,
    signal,
    note: (text: string) => say("warn", text),
  };
  const server = serverOf(args);
  const connectTo = (name: string, { direct = false }: Pick<RemoteOptions, "direct"> = {}) => {
    const servers = parseServers(name);
    // A resume log may name a server of anybody: the token is for those that the user names.
    const isNamed = areAmong(servers, parseServers(server));
    if (options.token !== undefined && !isNamed)
      say("warn", `${quote(name)} gets no token: it is not named by --server`);
    return new Remote({ ...options, token: isNamed ? options.token : undefined, servers, direct });
  };
  return {
    remote: connectTo(server),
    server,
    isNamed: args.server !== undefined,
    connectTo,
    credentials,
    jobs: numberOption(args, "jobs", { min: 1, max: 64 }),
    folder: undefined,
    json: args.json === true,
  };
}

function areAmong(servers: Address[], named: Address[]): boolean {
  return servers.every((server) => named.some((one) => Bun.deepEquals(one, server)));
}

export function serverOf(args: Args): string {
  return String(args.server ?? (process.env.REPRISE_SERVER || `127.0.0.1:${DEFAULT_PORT}`));
}

/** Who the client is, and whom it trusts: also for what is asked beside the commands. */
export function credentialsOf(args: Args): Pick<RemoteOptions, "token" | "ca"> {
  return { token: tokenOf(args), ca: issuersOf(args) };
}

/** From --token-file or REPRISE_TOKEN. Throws `insecure` where others can read the file. */
function tokenOf(args: Args): string | undefined {
  const file = args["token-file"];
  const text = file === undefined ? process.env.REPRISE_TOKEN : readLocal(String(file), "the token", checkPrivate);
  const token = text?.trim();
  if (token === undefined || (token === "" && file === undefined)) return undefined;
  const isToken = /^[\x21-\x7e]+$/.test(token) && token.length <= MAX_TOKEN_BYTES;
  if (!isToken) throw usage(`${file === undefined ? "REPRISE_TOKEN" : quote(String(file))} holds no access token`);
  return token;
}

/** From --ca or REPRISE_CA. A file without any certificate would be as good as none. */
function issuersOf(args: Args): string | undefined {
  const file = String(args.ca ?? process.env.REPRISE_CA ?? "");
  if (file === "") return undefined;
  const text = readLocal(file, "the certificates");
  if (!/^-----BEGIN [A-Z0-9 ]*CERTIFICATE-----/m.test(text)) throw usage(`${quote(file)} holds no certificate in PEM`);
  return text;
}

function checkPrivate(fd: number, path: string): void {
  if ((fstatSync(fd).mode & 0o077) === 0) return;
  throw new RepriseError(
    "insecure",
    `the token in ${quote(path)} can be read by others; chmod 600 it, or make a new one`,
  );
}

function readLocal(path: string, what: string, check?: (fd: number, path: string) => void): string {
  try {
    const fd = openSync(path, "r");
    try {
      check?.(fd, path);
      return readFileSync(fd, "utf8");
    } finally {
      closeSync(fd);
    }
  } catch (error) {
    if (error instanceof RepriseError) throw error;
    const why = (error as NodeJS.ErrnoException).code;
    throw new RepriseError("local", `${what} in ${quote(path)} cannot be read: ${why}`, error);
  }
}

/** Aborts on SIGINT and SIGTERM, and sees to it that the process then ends even if something hangs. */
export const interruption = new AbortController();
function watchSignals(): AbortSignal {
  for (const [name, code] of [
    ["SIGINT", "interrupted"],
    ["SIGTERM", "terminated"],
  ] as const) {
    process.on(name, () => {
      const end = () => process.exit(ERRORS[code].exit);
      if (interruption.signal.aborted) end();
      interruption.abort(new RepriseError(code));
      setTimeout(end, INTERRUPT_MS).unref();
    });
  }
  return interruption.signal;
}

export function isInterruption(error: unknown): error is RepriseError {
  return error instanceof RepriseError && (error.code === "interrupted" || error.code === "terminated");
}

/** Failures of some of many: each has its line, the first is thrown in the end and gives the exit status. */
export class Failures {
  #first: RepriseError | undefined;
  count = 0;

  add(problem: unknown): void {
    const error = asFailure(problem);
    const fatal = !(error instanceof RepriseError) || error.code === "pipe_closed" || interruption.signal.aborted;
    if (fatal) throw error;
    report(error);
    this.#first ??= error;
    this.count++;
  }

  throwFirst(): void {
    if (this.#first) throw this.#first;
  }
}

/** Every item is tried. */
export async function forEach<T>(items: Iterable<T>, work: (item: T) => Promise<unknown>): Promise<void> {
  const failures = new Failures();
  for (const item of items) await work(item).catch((error) => failures.add(error));
  failures.throwFirst();
}

/** At the prompt `..`, `.` and a leading slash mean what they mean in a shell; elsewhere the server sees every word. */
export function resolveRemote(folder: string | undefined, path: string): string {
  if (folder !== undefined) return posix.resolve("/", folder, path).slice(1);
  return path === "/" ? "" : path.length > 1 && path.endsWith("/") ? path.slice(0, -1) : path;
}

/** The path of a name in a folder of the server. */
export function remoteJoin(folder: string, name: string): string {
  return folder === "" ? name : name === "" ? folder : `${folder}/${name}`;
}
