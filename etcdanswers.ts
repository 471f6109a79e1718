/**
 * What etcd's JSON gateway answers, looked at for what it has to be before anybody relies on it. Something else may be
 * there in its place, or between: a proxy, an older gateway, one that was cut. It is an error then, not a keeper's end.
 */
import type { KeyValue, Operation, Range, Txn, Watched } from "./etcd.ts";
import { RepriseError } from "./protocol.ts";

/** Characters of one answer, of 500 records as a rule, and of one message of a watch, which etcd cuts at 2 MiB before base64. */
const MAX_CHARACTERS = 16 * 1024 * 1024;

type Said = { [name: string]: unknown };
type Check = (answer: Said, asked: object) => boolean;

const CHECKS: { [path: string]: Check } = {
  "/v3/kv/range": (answer, asked) => isRangeAnswer(answer, asked as Range),
  "/v3/kv/txn": (answer, asked) => isTxnAnswer(answer, asked as Txn),
  "/v3/lease/grant": ({ ID }) => isNumber(ID),
  "/v3/lease/keepalive": ({ result }) => isObject(result) && (result.TTL === undefined || isNumber(result.TTL, true)),
};

/** Throws `busy` where that is no answer to what was asked. */
export function checkAnswer(path: string, asked: object, answer: Said): void {
  if (CHECKS[path]?.(answer, asked) === false) throw notEtcd(path);
}

/** A message of a watch. Throws the same. */
export function checkWatched(result: unknown): asserts result is Watched {
  if (!isObject(result) || !isWatched(result)) throw notEtcd("/v3/watch");
}

/** What was sent, as text, a part at a time; no more of it than there may be. Throws `busy`. */
export async function* textsOf(response: Response): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  if (!response.body) return;
  for await (const chunk of response.body as unknown as AsyncIterable<Uint8Array>)
    yield decoder.decode(chunk, { stream: true });
}

/** Throws `too_large`: who asks for less may get it. */
export async function wholeTextOf(response: Response): Promise<string> {
  const parts: string[] = [];
  let characters = 0;
  for await (const part of textsOf(response)) {
    characters += part.length;
    if (characters > MAX_CHARACTERS)
      throw new RepriseError("too_large", `etcd at ${new URL(response.url).host} sends an answer that is too long`);
    parts.push(part);
  }
  return parts.join("");
}

export function checkLength(characters: number): number {
  if (characters > MAX_CHARACTERS) throw new RepriseError("busy", "it sends a message that has no end");
  return characters;
}

function notEtcd(path: string): RepriseError {
  return new RepriseError("busy", `it does not answer ${path} as etcd 3.4 or later does`);
}

// ---------------------------------------------------------------------------------------------------- shapes

/** As many keys as were asked for, all of them from there. */
function isRangeAnswer(answer: unknown, { key, range_end }: Range): boolean {
  if (!isObject(answer)) return false;
  const { kvs = [], more = false } = answer;
  if (typeof more !== "boolean" || !Array.isArray(kvs) || !kvs.every(isKeyValue)) return false;
  if (more && kvs.length === 0) return false;
  if (range_end === undefined) return kvs.every((kv) => kv.key === key);
  const [first, end] = [bytesOf(key), bytesOf(range_end)];
  return kvs.every((kv) => {
    const at = bytesOf(kv.key);
    return at.compare(first) >= 0 && at.compare(end) < 0;
  });
}

/** As many as there were operations. Where nothing is compared it can only succeed. */
function isTxnAnswer({ header, succeeded = false, responses = [] }: Said, asked: Txn): boolean {
  const { compare = [], success, failure = [] } = asked;
  if (!isObject(header) || !isNumber(header.revision)) return false;
  if (typeof succeeded !== "boolean" || !Array.isArray(responses)) return false;
  if (!succeeded && compare.length === 0) return false;
  const operations = succeeded ? success : failure;
  return responses.length === operations.length && operations.every((one, at) => isResponse(responses[at], one));
}

function isResponse(response: unknown, operation: Operation): boolean {
  if (!isObject(response)) return false;
  return !("request_range" in operation) || isRangeAnswer(response.response_range, operation.request_range);
}

function isWatched({
  header,
  created,
  canceled,
  fragment,
  compact_revision,
  cancel_reason,
  events = [],
}: Said): boolean {
  const areFlags = [created, canceled, fragment].every((flag) => flag === undefined || typeof flag === "boolean");
  const isHeader = header === undefined || (isObject(header) && isOptional(header.revision));
  const isReason = cancel_reason === undefined || typeof cancel_reason === "string";
  return (
    areFlags && isHeader && isReason && isOptional(compact_revision) && Array.isArray(events) && events.every(isEvent)
  );
}

function isEvent(event: unknown): boolean {
  return isObject(event) && (event.type === undefined || typeof event.type === "string") && isKeyValue(event.kv);
}

function isKeyValue(kv: unknown): kv is KeyValue {
  if (!isObject(kv) || typeof kv.key !== "string" || !isNumber(kv.mod_revision)) return false;
  return kv.value === undefined || typeof kv.value === "string";
}

function isObject(value: unknown): value is Said {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isOptional(value: unknown): boolean {
  return value === undefined || isNumber(value, true);
}

/** 64 bits, as text or as a number: of a lease's id more than a number has. */
function isNumber(value: unknown, isSigned = false): boolean {
  if (typeof value === "number") return Number.isSafeInteger(value) && (isSigned || value > 0);
  return typeof value === "string" && (isSigned ? /^-?\d{1,19}$/ : /^\d{1,19}$/).test(value);
}

function bytesOf(base64: string): Buffer {
  return Buffer.from(base64, "base64");
}
