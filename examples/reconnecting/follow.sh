#!/usr/bin/env bash
# One turn over curl, to its end, however often the connection breaks: follow.sh URL BODY
url=$1 body=$2 key=$(cat /proc/sys/kernel/random/uuid) last='' id='' event=''
while [ "$event" != end ]; do
  while IFS= read -r line; do
    case $line in
      'id: '*) id=${line#id: } ;;
      'event: '*) event=${line#event: } ;;
      '') [ "$id" = "$last" ] || echo "$id $event"; last=$id ;; # an event counts once it is whole
      'curl: 22') exit 1 ;; # the sidecar refused it
    esac
  done < <(
    curl -sSN --fail --max-time 3600 --speed-limit 1 --speed-time 10 "$url/v1/chat" -H 'content-type: application/json' \
      -H "idempotency-key: $key" ${last:+-H "last-event-id: $last"} -d "$body"
    printf 'curl: %s\n' $?
  )
  [ "$event" = end ] || sleep 0.5
done
